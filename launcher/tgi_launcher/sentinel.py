"""Outlives the launcher by a moment: kills what it left running and removes what it left lying.

Each child dies with the launcher by itself (see processes.py), but the kernel says nothing to the processes
that a child started. So the launcher runs this file as a process of its own and tells it, a JSON line each,
which process groups live (`{"watch": pgid}`, `{"forget": pgid}`) and which paths to remove
(`{"remove": path}`). The end of that stream is the end of the launcher, however it came. The file stands
alone: it is started without site-packages, in a few milliseconds.
"""

import contextlib
import json
import os
import shutil
import signal
import sys


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    paths: list[str] = []
    for line in sys.stdin:
        match json.loads(line):
            case {"watch": int(group)}:
                groups.add(group)
            case {"forget": int(group)}:
                groups.discard(group)
            case {"remove": str(path)}:
                paths.append(path)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already, or no longer ours
            os.killpg(group, signal.SIGKILL)
    for path in paths:
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)  # nobody is left to hear of an error
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


if __name__ == "__main__":
    main()
