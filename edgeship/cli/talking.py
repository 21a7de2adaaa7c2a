"""What the command line shows of language models: their speed, and a conversation."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.table import Table

from edgeship.cli.printing import console
from edgeship.core.report import Measurement
from edgeship.core.units import human_bytes

if TYPE_CHECKING:
    from edgeship.conversation import Conversation

# People notice a wait beyond the first, and read slower than the second.
WANTED_FIRST_MS = 300.0
WANTED_TOKENS_S = 50.0


def is_text(rows: Sequence[tuple[str, Measurement]]) -> bool:
    """Whether figures are those of language models."""
    return any(item.unit == "tokens/s" for _, item in rows)


def print_text_bench(rows: Sequence[tuple[str, Measurement]]) -> None:
    """One line an artifact and depth: tokens a second with their spread, time to the first token, peak memory."""
    table = Table()
    for name in ("artifact", "depth", "prefill", "decode", "first token", "peak memory", "note"):
        table.add_column(name, justify="left" if name in ("artifact", "note") else "right")
    for artifact in dict.fromkeys(name for name, _ in rows):
        figures = [item for name, item in rows if name == artifact]
        depths = dict.fromkeys(item.name.partition("@")[2] for item in figures)
        for depth in depths:
            found = {item.name.partition("@")[0]: item for item in figures if item.name.partition("@")[2] == depth}
            speed, first, peak = found.get("decode"), found.get("first_token"), found.get("peak_memory")
            memory = human_bytes(peak.value) if peak and peak.value is not None else "-"
            notes = [item.note for item in (found.get("prefill"), speed) if item is not None and item.note]
            notes = notes or [item.note for item in figures if item.note]
            table.add_row(
                artifact, depth or "0", _spread(found.get("prefill")), _marked(speed, WANTED_TOKENS_S, above=True),
                _marked(first, WANTED_FIRST_MS, above=False), memory, "; ".join(dict.fromkeys(notes)),
            )  # fmt: skip
    console().print(table)
    wanted = f"{WANTED_TOKENS_S:g} tokens/s or more, first token within {WANTED_FIRST_MS:g} ms"
    console().print(f"[green]ok[/]: {wanted}, on this machine")


def _spread(item: Measurement | None) -> str:
    if item is None or item.value is None:
        return "-"
    half = max((item.high or item.value) - item.value, item.value - (item.low or item.value))
    unit = "tok/s" if item.unit == "tokens/s" else item.unit
    return f"{item.value:.4g} ± {half:.2g} {unit}"


def _marked(item: Measurement | None, limit: float, *, above: bool) -> str:
    if item is None or item.value is None:
        return "-"
    good = item.value >= limit if above else item.value <= limit
    return f"{_spread(item)} [green]ok[/]" if good else _spread(item)


def converse(talk: Conversation, prompt: str | None, limit: int) -> None:
    """One answer to ``prompt``, or a conversation until the input ends."""
    if prompt is not None:
        _answer(talk, prompt, limit)
        return
    if sys.stdin.isatty():
        click.echo(f"{talk.title}. An empty line ends; /new forgets what was said.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        if line.strip() == "/new":
            talk.reset()
            continue
        _answer(talk, line, limit)


def _answer(talk: Conversation, text: str, limit: int) -> None:
    start = time.perf_counter()
    for piece in talk.say(text, limit):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    seconds = time.perf_counter() - start
    click.echo(f"[{talk.written} tokens, {talk.written / seconds:.1f} tokens/s{talk.remark}]", err=True)
