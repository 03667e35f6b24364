"""A stand-in for the hub on 127.0.0.1: the routes that a download uses, answered from folders of the test.

The real huggingface_hub client talks to it, pointed here by HF_ENDPOINT or Hub.endpoint.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/(?P<id>[\w.-]+/[\w.-]+)(/revision/(?P<revision>.+))?")
_FILE = re.compile(r"/(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Repository:
    folder: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})  # name -> commit
    token: str | None = None  # private: 401 without it
    gated: bool = False  # listed, but its files answer 403


@dataclass
class FakeHub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "METHOD /path", in order of arrival
    failures: dict[str, int] = field(
        default_factory=dict
    )  # file name -> how many GETs of it still answer 500
    cuts: dict[str, int] = field(default_factory=dict)  # file name -> how many GETs still break off half-way

    def add(self, model_id: str, folder: Path, **fields: object) -> Repository:
        self.repositories[model_id] = Repository(folder, **fields)  # type: ignore[arg-type]
        return self.repositories[model_id]

    def num_fetched(self, name: str) -> int:
        return sum(line.startswith("GET") and line.endswith(f"/{name}") for line in self.requests)


@contextmanager
def running() -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.fake_hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.fake_hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: object) -> None:
        """Requests are noted in FakeHub.requests instead of on stderr."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path  # still quoted: a revision may contain %2F
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        if match := _INFO.fullmatch(path):
            self._info(match["id"], unquote(match["revision"] or "main"))
        elif match := _FILE.fullmatch(path):
            self._file(match["id"], unquote(match["revision"]), unquote(match["name"]), with_body)
        else:
            self._error(404, "EntryNotFound")

    def _repository(self, model_id: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; None once an error has been sent.

        What one may not see is a 401, as on the hub.
        """
        repository = self.hub.repositories.get(model_id)
        sent = self.headers.get("Authorization", "")
        if repository is None or (repository.token is not None and sent != f"Bearer {repository.token}"):
            self._error(401, "RepoNotFound")
            return None
        commit = repository.revisions.get(
            revision, revision if revision in repository.revisions.values() else None
        )
        if commit is None:
            self._error(404, "RevisionNotFound")
            return None
        return repository, commit

    def _info(self, model_id: str, revision: str) -> None:
        if (found := self._repository(model_id, revision)) is None:
            return
        repository, commit = found
        files = sorted(path for path in repository.folder.rglob("*") if path.is_file())
        siblings = [
            {"rfilename": str(path.relative_to(repository.folder)), "size": path.stat().st_size}
            for path in files
        ]
        body = {
            "id": model_id,
            "modelId": model_id,
            "sha": commit,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
        }
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, model_id: str, revision: str, name: str, with_body: bool) -> None:
        if (found := self._repository(model_id, revision)) is None:
            return
        repository, commit = found
        path = repository.folder / name
        if repository.gated:
            self._error(403, "GatedRepo")
            return
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        if with_body and self._takes_one(self.hub.failures, name):
            self._error(500, "InternalError")
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = with_body and self._takes_one(self.hub.cuts, name)
        self._send(status, content[start:], headers, with_body=with_body, cut=cut)

    def _takes_one(self, counts: dict[str, int], name: str) -> bool:
        if counts.get(name, 0) == 0:
            return False
        counts[name] -= 1
        return True

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True
