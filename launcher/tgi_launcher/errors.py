"""Every way the launcher can end in an error: its name on stderr and its exit code."""

import json


class LauncherError(Exception):
    """Ends the launcher. Printed as `Error: Name` or `Error: Name("message")`."""

    exit_code = 1

    def __str__(self) -> str:
        name = type(self).__name__
        if not self.args:
            return name
        return f"{name}({json.dumps(self.args[0], ensure_ascii=False)})"


class ArgumentValidation(LauncherError):
    """Options that contradict one another or are out of bounds."""


class NotAvailableYet(LauncherError):
    """An option whose feature does not exist in this version."""


class NotEnoughCUDADevices(LauncherError):
    """`--sharded true` on a machine that shows one device or none."""


class UnknownDeviceCount(LauncherError):
    """`--sharded true`, and nothing tells how many devices there are."""

    exit_code = 101


class DownloadError(LauncherError):
    """The weights could not be found, fetched or converted."""


class ShardCannotStart(LauncherError):
    """A shard ended before it was ready, at the first start."""


class ShardFailed(LauncherError):
    """The shards died, and may not be restarted (again)."""


class WebserverCannotStart(LauncherError):
    """The router could not be executed."""


class WebserverFailed(LauncherError):
    """The router died, and may not be restarted (again)."""
