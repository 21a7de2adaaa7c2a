"""How many steps may run at once: by the cores and the memory that this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from edgeship.core.inventory import Inventory
from edgeship.errors import UsageError

# What --jobs is where it is not given.
VARIABLE = "EDGESHIP_JOBS"
# What a worker takes that lowers and checks a network: libraries and graphs; and copies of its weights and of its
# activations in float32. Bounds of what benchmarks/build_time.py finds.
WORKER_BYTES = 1_000_000_000
WEIGHT_COPIES, ACTIVATION_COPIES = 6, 4
FLOAT_BYTES = 4
CGROUPS = Path("/sys/fs/cgroup")


def wanted_jobs(asked: int | None, runtimes: int) -> int:
    """How many workers a build may start, before its model is known; 1 is to run every step in this process.

    Args:
        asked: as the user said, or None to go by cores. runtimes: how many are lowered for.
    """
    wanted = asked if asked is not None else _from_environment()
    return max(1, min(cores() if wanted is None else wanted, runtimes))


def jobs_for(asked: int | None, inventory: Inventory, runtimes: int) -> int:
    """How many workers a build has room for, as `wanted_jobs`; memory is looked at where the user did not say."""
    wanted = wanted_jobs(asked, runtimes)
    if asked is not None or os.environ.get(VARIABLE):
        return wanted
    # This process keeps what it has, and may need as much again for steps of its own.
    return max(1, min(wanted, free_bytes() // forecast(inventory) - 1))


def forecast(inventory: Inventory) -> int:
    """The most memory that lowering and checking one artifact takes, in bytes."""
    weights = WEIGHT_COPIES * inventory.parameters
    activations = ACTIVATION_COPIES * inventory.peak_activation_elements
    return WORKER_BYTES + FLOAT_BYTES * (weights + activations)


def _from_environment() -> int | None:
    text = os.environ.get(VARIABLE, "")
    if text and not (text.isdecimal() and 0 < int(text) < 1000):
        raise UsageError(f"{VARIABLE} is {text!r}, not a number of processes", fix="give 1 or more, or leave it unset")
    return int(text) if text else None


def cores() -> int:
    """Cores that this process may use: of the machine, less what its affinity and its container leave out."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for folder in _cgroups("cpu"):
        quota, period = _cpu_limit(folder)
        if quota > 0 and period > 0:
            # Half a core more is not one.
            count = min(count, max(1, int(quota / period)))
    return count


def free_bytes() -> int:
    """Memory that can be had without anything being swapped or ended: of the machine and of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder in _cgroups("memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit > 0:
            # Pages of files are given back when others need them.
            free = min(free, limit - used + _file_pages(folder))
    return max(0, free)


def _cgroups(controller: str) -> list[Path]:
    """Folders with the limits of this process, the outermost first."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, names, place = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            root = CGROUPS / controller if names else CGROUPS
            inner = root / place.lstrip("/")
            # In a container the path is that outside of it, and the limits lie at the root.
            found += [folder for folder in (root, *reversed(inner.parents), inner) if folder.is_relative_to(root)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _cpu_limit(folder: Path) -> tuple[int, int]:
    """Microseconds of processor time in each period; -1 where there is no limit."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return (-1 if quota == "max" else int(quota)), int(period)
    return _number(folder, "cpu.cfs_quota_us"), _number(folder, "cpu.cfs_period_us")


def _number(folder: Path, *names: str) -> int:
    """The number in the first of several files; -1 where none holds one."""
    for name in names:
        with suppress(OSError, ValueError):
            return int((folder / name).read_text(encoding="utf-8"))
    return -1


def _file_pages(folder: Path) -> int:
    """Bytes of files that nobody has used lately."""
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name in ("total_inactive_file", "inactive_file"):
                return int(value)
    return 0
