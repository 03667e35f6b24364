"""The command `text-generation-launcher`."""

import asyncio
import io
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import click

from tgi_demo import MODEL_PATH
from tgi_launcher import devices, model_info, supervise
from tgi_launcher.errors import DownloadError, LauncherError, NotAvailableYet, ShardCannotStart
from tgi_launcher.logs import Level, Log, level_from
from tgi_launcher.model_info import ModelInfo, NoConfig
from tgi_launcher.options import Options, describe, parse
from tgi_launcher.plan import memory_command, resolve
from tgi_launcher.processes import NotInPath, find_executable


def main() -> None:
    sys.exit(launch(sys.argv[1:], os.environ))


def launch(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code: launcher.md, section 10."""
    try:
        options = parse(argv, environ)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a child may log what is no Unicode
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)  # until supervise.run takes over
    try:
        if options.plan:
            return _print_memory(options, environ)
        _serve(options, environ, Log(sys.stdout, level_from(environ.get("LOG_LEVEL")), options.json_output))
    except LauncherError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:  # asked to stop before there was anything to stop
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # all is done: too late to change the exit code
    return 0


def _serve(options: Options, environ: Mapping[str, str], log: Log) -> None:
    """Raises LauncherError."""
    if options.env:
        log.info(_runtime_environment(environ))
    log.info(describe(options))
    model = _probe(options, environ, log)
    plan = resolve(options, model, devices.detect(environ), environ)
    for notice in plan.notices:
        log.emit(notice.level, notice.message)
    asyncio.run(supervise.run(plan, _demo_folder() if options.model_id == "demo" else None, log))


def _print_memory(options: Options, environ: Mapping[str, str]) -> int:
    """What `text-generation-server plan` says, and its exit code. Raises LauncherError."""
    log = Log(sys.stderr, level_from(environ.get("LOG_LEVEL")), options.json_output)  # stdout is the plan's
    if options.weights_cache_override is not None:
        raise NotAvailableYet("--plan with --weights-cache-override is not available yet")
    plan = resolve(options, _probe(options, environ, log), devices.detect(environ), environ)
    for notice in plan.notices:
        log.emit(notice.level, notice.message)
    model = str(_demo_folder()) if options.model_id == "demo" else options.model_id
    command = memory_command(plan, model)
    try:
        executable = find_executable(command.argv[0])
    except NotInPath as error:
        raise ShardCannotStart(str(error)) from error
    return subprocess.run([executable, *command.argv[1:]], env=command.environ, check=False).returncode


def _probe(options: Options, environ: Mapping[str, str], log: Log) -> ModelInfo | None:
    try:
        return model_info.probe(options.model_id, options.revision, environ, options.huggingface_hub_cache)
    except NoConfig as reason:
        # The download step will say what is wrong, if anything is; the plan can do without.
        log.emit(Level.WARN, f"Cannot read the config.json of {options.model_id}: {reason}")
        return None


def _demo_folder() -> Path:
    if not (MODEL_PATH / "config.json").is_file():
        raise DownloadError(f"the demo model is not installed: there is no {MODEL_PATH / 'config.json'}")
    return MODEL_PATH


def _runtime_environment(environ: Mapping[str, str]) -> str:
    lines = [
        "Runtime environment:",
        f"Target: {platform.machine()}-{sys.platform}",
        f"Python version: {platform.python_version()}",
        f"Package version: {version('text-generation-server')}",
        f"Commit sha: {environ.get('GIT_SHA', 'N/A')}",
        f"Docker label: {environ.get('DOCKER_LABEL', 'N/A')}",
        "nvidia-smi:",
        *(devices.nvidia_smi() or ["N/A"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
