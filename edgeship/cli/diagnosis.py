"""What ``doctor`` looks at, and where a crash is written down."""

from __future__ import annotations

import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from edgeship.core.installed import clashes, remarks, wanted
from edgeship.core.registry import Broken, broken, devices
from edgeship.core.runtimes import Availability
from edgeship.version import __version__


@dataclass(frozen=True)
class Diagnosis:
    """The state of this machine.

    Args:
        packages: versions that were not tested and packages that are missing, a line each.
        devices: how each is named after ``--device``, and what it is.
    """

    version: str
    machine: dict[str, str]
    runtimes: tuple[Availability, ...]
    packages: tuple[str, ...]
    devices: dict[str, str]
    broken_plugins: tuple[Broken, ...]
    cache: str
    cache_bytes: int
    free_bytes: int


def diagnose() -> Diagnosis:
    """Look at everything once; nothing is changed."""
    import shutil

    from edgeship.api import availability
    from edgeship.core.artifact import total_bytes
    from edgeship.engine.cache import default_cache_root
    from edgeship.engine.gathering import machine

    root = default_cache_root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    return Diagnosis(
        __version__,
        machine(),
        tuple(availability()),
        (*clashes(), *remarks(wanted())),
        {f"{name}:{item.argument}" if item.argument else name: item.summary for name, item in devices().items()},
        broken(),
        str(root),
        total_bytes(root) if root.exists() else 0,
        shutil.disk_usage(existing).free,
    )


def print_diagnosis(found: Diagnosis) -> None:
    """For people."""
    import click

    from edgeship.cli.printing import print_runtimes
    from edgeship.core.units import human_bytes

    machine = found.machine
    click.echo(f"edgeship {found.version}, Python {machine['python']}, {machine['system']}, {machine['cores']} cores, "
               f"{machine['memory_gib']} GiB, {machine['processor']}")  # fmt: skip
    click.echo(
        f"cache {found.cache}: {human_bytes(found.cache_bytes)}, {human_bytes(found.free_bytes)} free on its disk"
    )
    print_runtimes(found.runtimes)
    for line in found.packages:
        click.echo(line)
    for name, summary in found.devices.items():
        click.echo(f"device {name}: {summary}")
    for item in found.broken_plugins:
        click.echo(f"broken plug-in {item.name} ({item.group}): {item.reason}; update or uninstall it")
    if not found.broken_plugins:
        click.echo("no broken plug-ins")


def write_crash(error: BaseException) -> Path:
    """The traceback of a bug, in a file of its own beside the other logs; where those cannot be written, in the
    system's folder for temporary files."""
    from edgeship.engine import chatter
    from edgeship.engine.cache import logs_folder

    text = f"edgeship {__version__}: {' '.join(sys.argv)}\n" + "".join(traceback.format_exception(error))
    try:
        return chatter.write_crash(logs_folder(), text)
    except OSError:
        return chatter.write_crash(Path(tempfile.gettempdir()), text)
