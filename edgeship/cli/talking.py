"""What the command line shows of language models: their speed, and a conversation."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.table import Table

from edgeship.cli import interrupt
from edgeship.cli.printing import console, shown_bytes
from edgeship.core.report import Measurement
from edgeship.errors import UsageError

if TYPE_CHECKING:
    from edgeship.conversation import Conversation

# People notice a wait beyond the first, and read slower than the second.
WANTED_FIRST_MS = 300.0
WANTED_TOKENS_S = 50.0
LEFT = "left; what was said is not kept"
HELP = """/new   forget what was said, and begin anew
/exit  leave, as Ctrl-D does
/help  this
Ctrl-C stops an answer, which stays as far as it was written; at the prompt it leaves."""


def is_text(rows: Sequence[tuple[str, Measurement]]) -> bool:
    """Whether figures are those of language models."""
    return any(item.unit == "tokens/s" for _, item in rows)


def print_text_bench(rows: Sequence[tuple[str, Measurement]]) -> None:
    """One line an artifact and depth: tokens a second with their spread, time to the first token, peak memory."""
    table = Table()
    for name in ("artifact", "depth", "prefill", "decode", "first token", "peak memory", "note"):
        table.add_column(name, justify="left" if name in ("artifact", "note") else "right")
    # Artifact and depth -> figures by name: ``decode@512`` is decoding behind 512 tokens.
    lines: dict[tuple[str, str], dict[str, Measurement]] = {}
    notes: dict[str, list[str]] = {}
    for artifact, item in rows:
        name, _, depth = item.name.partition("@")
        lines.setdefault((artifact, depth), {})[name] = item
        notes.setdefault(artifact, []).append(item.note)
    for (artifact, depth), found in lines.items():
        speeds = [found[name].note for name in ("prefill", "decode") if name in found]
        said = dict.fromkeys(filter(None, speeds)) or dict.fromkeys(filter(None, notes[artifact]))
        table.add_row(
            artifact,
            depth or "0",
            _spread(found.get("prefill")),
            _marked(found.get("decode"), WANTED_TOKENS_S, above=True),
            _marked(found.get("first_token"), WANTED_FIRST_MS, above=False),
            shown_bytes(found.get("peak_memory")),
            "; ".join(said),
        )
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


def converse(talk: Conversation, prompt: str | None, limit: int) -> int:
    """One answer to ``prompt``, or a conversation until the input ends; the exit code.

    Ctrl-C stops an answer and keeps the conversation; while nothing is written it leaves. Of messages that cannot be
    answered it is said why, and they are taken back.

    Raises `UsageError` when ``prompt`` cannot be answered.
    """
    if prompt is not None:
        return _answer(talk, prompt, limit)
    person = sys.stdin.isatty()
    if person:
        click.echo(f"{talk.title}. /help says what can be typed.", err=True)
    while True:
        try:
            line = input("> " if person else "").strip("\n")
        except EOFError:
            if person:
                click.echo()
            return 0
        except KeyboardInterrupt:
            # A press at the prompt; one that stopped an answer does not come here.
            click.echo()
            click.echo(LEFT, err=True)
            return interrupt.EXIT_CODE
        except UnicodeDecodeError:
            click.echo("[that is no UTF-8 text; it was not read]", err=True)
            continue
        word = line.strip()
        if word == "/exit":
            return 0
        if word and not _command(talk, word):
            try:
                _answer(talk, line, limit)
            except UsageError as error:
                click.echo(f"[{error}]", err=True)


def _command(talk: Conversation, word: str) -> bool:
    """Obey a line that is a command; whether it was one."""
    if word == "/new":
        talk.reset()
        click.echo("[what was said is forgotten]", err=True)
    elif word == "/help":
        click.echo(HELP, err=True)
    elif re.fullmatch(r"/[a-z]+", word):
        click.echo(f"[there is no {word}; /help says what there is]", err=True)
    else:
        return False
    return True


def _answer(talk: Conversation, text: str, limit: int) -> int:
    """Print an answer as it is written; 130 when it was stopped."""
    start = time.perf_counter()
    with interrupt.held() as pressed:
        talk.stopped = pressed
        pieces = talk.say(text, limit)
        try:
            for piece in pieces:
                click.echo(piece, nl=False)
                sys.stdout.flush()
            stopped = pressed()
        except KeyboardInterrupt:  # where nobody listens for presses
            pieces.close()
            stopped = True
    click.echo()
    seconds = time.perf_counter() - start
    said = "".join(f"; {remark}" for remark in talk.remarks)
    click.echo(f"[{talk.written} tokens, {talk.written / seconds:.1f} tokens/s{said}]", err=True)
    return interrupt.EXIT_CODE if stopped else 0
