"""What the command line calls and notebooks call: ``build``, ``plan``, ``bench``, ``verify``."""

from edgeship.api.building import build, log_path, plan, side_log, trusted
from edgeship.api.checking import availability, bench, verify
from edgeship.api.orders import BuildOrder
from edgeship.api.preparing import prepare

__all__ = [
    "BuildOrder",
    "availability",
    "bench",
    "build",
    "log_path",
    "plan",
    "prepare",
    "side_log",
    "trusted",
    "verify",
]
