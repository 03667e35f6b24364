"""The sockets and the port at which a launcher's processes find one another, out of other launchers' way."""

import os
import socket
import stat
import sys
import tempfile
from pathlib import Path
from typing import Self

from tgi_launcher.options import Options
from tgi_launcher.plan import Rendezvous


class Venue:
    """Where the group meets. The sockets' prefix never changes; the port is chosen anew at each start.

    Options that were set are taken as given. The defaults belong to the first launcher on the machine; the
    others get a private directory and a free port.
    """

    def __init__(self, options: Options, num_shard: int) -> None:
        self._options = options
        self._num_shard = num_shard
        self._claim = _claim_defaults()
        self.private_dir: Path | None = None
        self.uds_path = options.shard_uds_path
        if "shard_uds_path" not in options.given and (self._claim is None or self._sockets_are_taken()):
            self.private_dir = Path(tempfile.mkdtemp(prefix="text-generation-server-", dir="/tmp"))
            self.uds_path = str(self.private_dir / "shard")

    def socket_paths(self) -> list[Path]:
        return [Path(f"{self.uds_path}-{rank}") for rank in range(self._num_shard)]

    def paths(self) -> list[Path]:
        """Everything of ours in the file system."""
        return [*self.socket_paths(), *([self.private_dir] if self.private_dir else [])]

    def rendezvous(self) -> Rendezvous:
        """For one start of the group: removes the sockets of the last one."""
        for path in self.socket_paths():
            if is_socket(path):
                path.unlink()
        return Rendezvous(self.uds_path, self._master_port())

    def _sockets_are_taken(self) -> bool:
        """Whether somebody listens there (shards started by hand), or what lies there is not ours."""
        return any(
            path.exists() and (path.stat().st_uid != os.geteuid() or not is_socket(path) or _answers(path))
            for path in self.socket_paths()
        )

    def _master_port(self) -> int:
        port = self._options.master_port
        if "master_port" in self._options.given or (self._claim is not None and _is_free(port)):
            return port
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._claim is not None:
            self._claim.close()


def is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _claim_defaults() -> socket.socket | None:
    """An abstract socket as a lock that leaves no file and ends with us. None: another launcher has it."""
    if sys.platform != "linux":
        return None
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind("\0text-generation-launcher")
    except OSError:
        claim.close()
        return None
    return claim


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _is_free(port: int) -> bool:
    """Whether torch.distributed could listen there; ports in TIME_WAIT are free to it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
