"""Names of inputs and outputs: any text in a source, one spelling that every runtime takes in the artifacts.

A clean name is ASCII letters, digits and underscores, does not start with a digit, is at most `MAX_LENGTH` long and is
reserved neither by Python nor by Core ML's program text. Cleaning is done once, when a source becomes a torch program;
`TensorSpec.source` keeps what the source says.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

MAX_LENGTH = 64

#: Words that Core ML's program text reserves (coremltools renames such inputs behind the caller's back).
_COREML = frozenset({
    "any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string", "state",
    "bf16", "fp16", "fp32", "fp64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
})  # fmt: skip

Role = Literal["input", "output"]


def is_clean(name: str) -> bool:
    """Whether every runtime takes ``name`` as it is."""
    plain = name.isascii() and name.isidentifier() and len(name) <= MAX_LENGTH
    return plain and not keyword.iskeyword(name) and name not in _COREML


def clean_name(name: str, role: Role) -> str:
    """The nearest clean name: ``x:0`` is ``x_0``, ``größe`` is ``grosse``, ``0`` as an input is ``input_0``."""
    if is_clean(name):
        return name
    spelled = re.sub(r"[^0-9A-Za-z_]+", "_", "".join(_ascii(letter) for letter in name)).strip("_")
    spelled = spelled[:MAX_LENGTH].rstrip("_")
    if is_clean(spelled):
        return spelled
    return f"{role}_{spelled}"[:MAX_LENGTH].rstrip("_")


def clean_names(names: Sequence[str], role: Role, taken: Iterable[str] = (), avoided: Iterable[str] = ()) -> list[str]:
    """One clean name for each, in order, no two alike and none in ``taken``.

    A name that is clean already stays as it is, wherever it stands; only one that must change makes room, for names
    in ``avoided`` too.
    """
    used, avoid = set(taken), set(avoided)
    kept = {name for name in names if is_clean(name) and name not in used}
    found: list[str] = []
    given: set[str] = set()
    for name in names:
        clean = clean_name(name, role)
        if clean in used or clean in given or (clean != name and clean in kept | avoid):
            clean = _free(clean, used | kept | given | avoid)
        given.add(clean)
        found.append(clean)
    return found


def quoted(name: str) -> str:
    """``name`` as ``--input`` reads it: in double quotes where it would read as something else."""
    return name if re.fullmatch(r"[A-Za-z_][\w./-]*", name, flags=re.ASCII) else f'"{name}"'


def in_shell(text: str) -> str:
    """``text`` as a shell reads it as one word."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", text, flags=re.ASCII):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def _ascii(letter: str) -> str:
    """The letter without its accents; one that has no such form becomes a separator."""
    if letter.isascii():
        return letter
    for form in (letter, letter.casefold()):
        plain = unicodedata.normalize("NFKD", form).encode("ascii", "ignore").decode()
        if plain:
            return plain
    return " "


def _free(name: str, used: set[str]) -> str:
    count = 2
    while f"{name}_{count}" in used:
        count += 1
    return f"{name}_{count}"
