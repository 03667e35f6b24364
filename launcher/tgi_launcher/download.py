"""The download step: finds, fetches or converts the weights, in a process of its own."""

import asyncio
from pathlib import Path

from tgi_launcher.errors import DownloadError
from tgi_launcher.logs import Log, Span, parse_child_line, relay
from tgi_launcher.plan import Plan, download_command
from tgi_launcher.processes import Family, NotInPath

SPAN = Span("download")
GRACE_S = 10.0


async def download(plan: Plan, family: Family, log: Log) -> Path:
    """The local folder with the model's files, which the step's last line tells. Raises DownloadError."""
    folders: list[str] = []

    def on_line(line: bytes) -> None:
        record = parse_child_line(line)
        match record:
            case {"model_path": str(folder)}:
                folders.append(folder)
            case _:
                relay(log, line, record, SPAN)

    log.info(f"Starting check and download process for {plan.options.model_id}", SPAN)
    try:
        child = family.start("download", download_command(plan), on_line)
    except NotInPath as error:
        log.error(str(error), SPAN)
        log.error("Please install it with `make install-server`", SPAN)
        raise DownloadError from error
    except OSError as error:
        log.error(f"Download encountered an error: {error}", SPAN)
        raise DownloadError from error
    try:
        code = await child.wait()
    except asyncio.CancelledError:
        await child.end(GRACE_S, log, SPAN)
        raise
    stderr = child.stderr.text()
    if code < 0:
        log.error(f"Download process was signaled to shutdown with signal {-code}: {stderr}", SPAN)
        raise DownloadError
    if code > 0:
        log.error(f"Download encountered an error: {stderr}", SPAN)
        raise DownloadError
    if not folders:
        log.error(f"Download encountered an error: it did not say where the files are. {stderr}", SPAN)
        raise DownloadError
    log.info(f"Successfully downloaded weights for {plan.options.model_id}", SPAN)
    return Path(folders[-1])
