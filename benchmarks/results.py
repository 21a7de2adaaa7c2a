"""A page of results: what made it, on what, with which versions, and one table."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from edgeship.engine.gathering import machine

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def write_page(
    name: str,
    title: str,
    command: str,
    packages: Sequence[str],
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    before: str = "",
    after: str = "",
) -> None:
    """Write ``docs/results/NAME.md`` and print its table.

    Args:
        packages: distributions whose versions belong to the figures. before, after: text around the table.
    """
    about = machine()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    made = (
        f"Made by `{command}`, {datetime.date.today()}, on {about['processor']}, {about['cores']} cores, "
        f"{about['memory_gib']} GiB, Python {about['python']}. Versions: {versions}."
    )
    table = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    table += [f"| {' | '.join(row)} |" for row in rows]
    parts = [f"# {title}", made, before.strip(), "\n".join(table), after.strip()]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    print("\n".join(table), flush=True)
