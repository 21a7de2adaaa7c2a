"""Names that the user gives to outputs: each in its place, or ``OLD=NEW``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeship.core.names import clean_name, quoted
from edgeship.errors import UsageError

# A name with an equals sign in it stands in quotes.
_PAIR = re.compile(r"^(?P<old>\"[^\"]+\"|'[^']+'|[^=]*[^=\s])\s*=\s*(?P<new>\S.*)$", re.DOTALL)


def named_outputs(given: Sequence[str], own: Sequence[str]) -> list[str]:
    """A name for each output, in order: those of the source, or what ``--output-name`` says.

    Args:
        given: names in order, or ``OLD=NEW`` each. own: what the source calls its outputs.

    Raises:
        UsageError: both forms at once, or an OLD that is no output.
    """
    if not any("=" in text for text in given):
        return list(given) or list(own)
    renames = parse_output_renames(given)
    spelled = {clean_name(name, "output"): name for name in own} | {name: name for name in own}
    strange = next((old for old in renames if old not in spelled), None)
    if strange is not None:
        raise UsageError(
            f"--output-name {strange!r}: the model has no such output", fix=f"it has {', '.join(map(quoted, own))}"
        )
    new = {spelled[old]: name for old, name in renames.items()}
    found = [new.get(name, name) for name in own]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two outputs are called {twice}", fix="give another name, or rename that one too")
    return found


def parse_output_renames(texts: Sequence[str]) -> dict[str, str]:
    """``--output-name OLD=NEW`` of each. Raises `UsageError` for another form, or a name that is given twice."""
    found: dict[str, str] = {}
    for text in texts:
        match = _PAIR.match(text.strip())
        if match is None:
            raise UsageError(
                f"--output-name {text!r} is not OLD=NEW, as another one is", fix="write all of them in one form"
            )
        old, new = match["old"].strip("\"'"), match["new"].strip()
        if old in found or new in found.values():
            raise UsageError(f"--output-name {text!r}: that name was given before", fix="give each name once")
        found[old] = new
    return found
