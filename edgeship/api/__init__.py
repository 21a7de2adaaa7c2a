"""What the command line calls and notebooks call: ``build``, ``plan``, ``open_bundle``, ``bench``, ``verify``."""

from edgeship.api.building import log_path, plan_order, run, side_log, trusted
from edgeship.api.bundles import Bundle, BundleArtifact, open_bundle
from edgeship.api.checking import availability, bench, verify
from edgeship.api.orders import BuildOrder, Said, make_order
from edgeship.api.preparing import prepare
from edgeship.api.python import build, plan

__all__ = [
    "BuildOrder",
    "Bundle",
    "BundleArtifact",
    "Said",
    "availability",
    "bench",
    "build",
    "log_path",
    "make_order",
    "open_bundle",
    "plan",
    "plan_order",
    "prepare",
    "run",
    "side_log",
    "trusted",
    "verify",
]
