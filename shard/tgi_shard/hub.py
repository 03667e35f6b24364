"""Hub id -> folder with all that router and shard need of the model: from the hub, or from its cache on this
machine.

The order of a download: list the repository; fetch everything but the weights, which are small files; refuse
what we cannot serve; fetch the weights; only then note in the cache which commit the revision stands for. So
a start without network finds either the whole model or none.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tgi_shard import model_folder
from tgi_shard.model_folder import ModelError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The hub's client changed its HTTP library from version to version; its error's base is that library's base
# error.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_FAILURES = (
    _TransportError,
    OSError,
    RuntimeError,
)  # RuntimeError: what the Xet client raises for most of its troubles

_SMALL_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_TEMPLATES = "additional_chat_templates/"
_TRANSIENT_STATUS = (408, 429)


@dataclass(frozen=True, slots=True)
class Hub:
    """How to reach the hub and where its cache lies."""

    cache_dir: Path
    token: str | None = None  # None: what `hf auth login` stored, if anything
    offline: bool = False
    endpoint: str | None = None  # None: HF_ENDPOINT, or huggingface.co
    max_attempts: int = 5  # for each file
    retry_wait_s: float = 5.0
    retry_deadline_s: float = 600.0  # counted from the first attempt for a file; none starts after it
    progress_every_s: float = 5.0

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token)


def cached(hub: Hub, model_id: str, revision: str | None, *, with_weights: bool = True) -> Path | None:
    """The snapshot in the cache, or None if its config or a weight file is not there. Asks no network."""
    try:
        config = try_to_load_from_cache(model_id, "config.json", cache_dir=hub.cache_dir, revision=revision)
    except HFValidationError as error:
        raise ModelError(
            f"{model_id} is neither a folder on this machine nor a valid hub id: {error}"
        ) from error
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    try:
        return snapshot if not with_weights or model_folder.local_weights(snapshot) else None
    except ModelError:  # an index that names a file which is not there: a download that did not finish
        return None


def locate(hub: Hub, model_id: str, revision: str | None) -> Path:
    """The folder of a model that is on this machine already: a local one, or the cached snapshot."""
    folder = Path(model_id)
    if folder.is_dir():
        return folder.resolve()
    snapshot = cached(hub, model_id, revision)
    if snapshot is None:
        raise ModelError(
            f"Weights of model {model_id} at revision {revision or 'main'} not found in {hub.cache_dir}. "
            f"Please run `text-generation-server download-weights {model_id}` first."
        )
    return snapshot


def download(
    hub: Hub, model_id: str, revision: str | None, *, with_code: bool, with_weights: bool = True
) -> Path:
    """The model's snapshot folder, complete. Downloads what the cache lacks; nothing with `hub.offline`.

    with_code: fetch the repository's Python files too (--trust-remote-code).
    Raises ModelError when there is no such model, no access to it, no network, or nothing to serve in it.
    """
    from_cache = partial(_from_cache, hub, model_id, revision, with_weights)
    if hub.offline:
        return from_cache("HF_HUB_OFFLINE is set")
    try:
        info = _retry(hub, lambda: hub.api.model_info(model_id, revision=revision, files_metadata=True))
    except (HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, HfHubHTTPError) and _is_transient(error):
            return from_cache(f"The hub fails: {_first_line(error)}")
        raise _explained(error, model_id, revision) from error
    except _FAILURES as error:
        return from_cache(f"The hub cannot be reached: {_first_line(error)}")
    assert info.sha is not None
    commit = info.sha
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

    small = [name for name in sizes if _is_small_file(name, with_code)]
    small.sort(key=lambda name: (name.count("/"), name))  # the top folder's first
    if "config.json" not in small and "adapter_config.json" not in small:
        raise ModelError(
            f"{model_id} has no config.json at revision {revision or 'main'}: it is not a model we can serve."
        )
    try:
        paths = [_retry(hub, partial(_fetch, hub, model_id, name, commit)) for name in small]
        snapshot = paths[0].parent
        model_folder.refuse_unsupported(model_id, snapshot)
        if with_weights:
            _download_weights(hub, model_id, revision, commit, snapshot, sizes)
        # By its name instead of the commit: this is what writes the name's entry into the cache.
        _retry(hub, partial(_fetch, hub, model_id, "config.json", revision))
    except _FAILURES as error:
        raise _explained(error, model_id, revision) from error
    return snapshot


def _download_weights(
    hub: Hub, model_id: str, revision: str | None, commit: str, snapshot: Path, sizes: dict[str, int]
) -> None:
    """Fetch the safetensors files, or the PyTorch ones where the repository has no others."""
    names = model_folder.weight_names(snapshot, sizes, ".safetensors")
    if not names:
        names = model_folder.weight_names(snapshot, sizes, ".bin")
        if not names:
            raise ModelError(
                f"No .safetensors weights found for model {model_id} and revision {revision or 'main'}."
            )
        logger.warning(
            "No safetensors weights found for model %s at revision %s. Downloading PyTorch weights.",
            model_id,
            revision or "main",
        )
    missing = [name for name in names if not (snapshot / name).is_file()]
    if not missing:
        logger.info("Files are already present on the host. Skipping download.")
        return
    for name in sorted(set(names) - set(missing)):
        logger.info("File %s already present in cache.", name)
    with _Progress(
        snapshot.parents[1] / "blobs", sum(sizes[name] for name in missing), hub.progress_every_s
    ) as progress:
        for i, name in enumerate(missing):
            logger.info("Download file: %s", name)
            started = time.monotonic()
            path = _retry(hub, partial(_fetch, hub, model_id, name, commit))
            progress.finished(sizes[name])
            logger.info("Downloaded %s in %s.", path, _duration(time.monotonic() - started))
            logger.info("Download: [%d/%d] -- ETA: %s", i + 1, len(missing), progress.eta())


def _from_cache(hub: Hub, model_id: str, revision: str | None, with_weights: bool, reason: str) -> Path:
    snapshot = cached(hub, model_id, revision, with_weights=with_weights)
    if snapshot is None:
        raise ModelError(
            f"{reason}, and model {model_id} at revision {revision or 'main'} is not (or not wholly) in the "
            f"cache {hub.cache_dir}."
        )
    model_folder.refuse_unsupported(model_id, snapshot)
    if not hub.offline:
        logger.warning("%s. Using the files in the cache.", reason)
    logger.info("Files are already present on the host. Skipping download.")
    return snapshot


def _is_small_file(name: str, with_code: bool) -> bool:
    """Config, tokenizer, templates, the weights' index: all but the weights and what is for people."""
    if name.startswith(_TEMPLATES):
        return name.endswith(".jinja")
    return "/" not in name and name.endswith((*_SMALL_FILES, ".py") if with_code else _SMALL_FILES)


def _fetch(hub: Hub, model_id: str, name: str, revision: str | None) -> Path:
    return Path(hub.api.hf_hub_download(model_id, name, revision=revision, cache_dir=hub.cache_dir))


def _retry(hub: Hub, attempt: Callable[[], T]) -> T:
    """What `attempt` returns; again after a pause when it fails in a way that may pass."""
    started = time.monotonic()
    for number in range(1, hub.max_attempts):
        try:
            return attempt()
        except _FAILURES as error:
            if (
                not _is_transient(error)
                or time.monotonic() + hub.retry_wait_s > started + hub.retry_deadline_s
            ):
                raise
            logger.warning("%s", _first_line(error))
            logger.info("Retrying in %g seconds", hub.retry_wait_s)
            time.sleep(hub.retry_wait_s)
            logger.info("Retry %d/%d", number, hub.max_attempts - 1)
    return attempt()


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, LocalEntryNotFoundError):  # "not on the hub, not in the cache"; why is in its cause
        return error.__cause__ is not None and _is_transient(error.__cause__)
    if isinstance(error, PermissionError | FileNotFoundError):
        return False
    if isinstance(error, OSError):
        # Without an error number: the client's complaint that a file came shorter or longer than announced.
        return error.errno is None or isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, _FAILURES)


def _explained(error: Exception, model_id: str, revision: str | None) -> ModelError:
    """What the failure means to someone who typed a model id."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _explained(error.__cause__, model_id, revision)
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"Access to model {model_id} is restricted: ask for it on the model's page, and pass the token "
            "of an account that has it in HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"Model {model_id} was not found: there is no such folder here, and no such model on the hub. "
            "If it is a private model, pass the token of an account that may read it in HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"Model {model_id} has no revision {revision or 'main'}.")
    if isinstance(error, HFValidationError):
        return ModelError(f"{model_id} is neither a folder on this machine nor a valid hub id: {error}")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return ModelError(f"The hub refuses the token for model {model_id}: {_first_line(error)}")
    return ModelError(f"Model {model_id} could not be downloaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class _Progress:
    """Says every few seconds how far the download is.

    It looks at what lies on disk: that holds for every way in which the hub's client fetches a file (HTTP,
    Xet).
    """

    def __init__(self, blobs: Path, total_bytes: int, every_s: float) -> None:
        self._blobs = blobs
        self._total_bytes = total_bytes
        self._every_s = every_s
        self._finished_bytes = 0
        self._started = time.monotonic()
        self._foreign_bytes = self._partial_bytes()  # left by others, or being fetched by them
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, name="download-progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finished(self, num_bytes: int) -> None:
        self._finished_bytes += num_bytes

    def eta(self) -> str:
        return self._eta(self._finished_bytes)

    def _report(self) -> None:
        last = 0
        while not self._stop.wait(self._every_s):
            done = min(
                self._total_bytes, self._finished_bytes + max(0, self._partial_bytes() - self._foreign_bytes)
            )
            done = last = max(
                last, done
            )  # a file that moves into place is for a moment neither partial nor finished
            rate = done / (time.monotonic() - self._started)
            logger.info(
                "Download: %.2f of %.2f GB (%d%%) at %.1f MB/s -- ETA: %s",
                done / 1e9,
                self._total_bytes / 1e9,
                100 * done // max(1, self._total_bytes),
                rate / 1e6,
                self._eta(done),
            )

    def _eta(self, done: int) -> str:
        if done == 0:
            return "unknown"
        return _duration((time.monotonic() - self._started) * (self._total_bytes - done) / done)

    def _partial_bytes(self) -> int:
        total = 0
        for path in self._blobs.glob("*.incomplete"):
            try:
                total += (
                    path.stat().st_blocks * 512
                )  # not st_size: files may be written from several places at once
            except FileNotFoundError:  # it has just been moved into place
                continue
        return total
