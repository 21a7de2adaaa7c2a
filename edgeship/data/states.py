"""Outputs that come back as inputs: the state of a recurrent network, a cache, a filter's memory."""

from __future__ import annotations

import re

from edgeship.core.model import Signature, TensorSpec

# Parts of a name that say which way a state goes, and nothing of which state it is.
_WAYS = {
    "in", "input", "out", "output", "prev", "previous", "last", "old", "next", "new", "cur", "current", "updated",
    "n", "o", "i", "t", "pre", "post", "initial", "final", "init", "past", "present",
}  # fmt: skip


def state_pairs(signature: Signature) -> dict[str, str]:
    """Output -> the input that it comes back as: of the same shape and dtype, with a name that differs only in words
    such as ``in``, ``next``, ``N``. A model needs another input beside its states."""
    pairs: dict[str, str] = {}
    for output in signature.outputs:
        fitting = [spec for spec in signature.inputs if _is_state(spec, output)]
        if len(fitting) == 1 and fitting[0].name not in pairs.values():
            pairs[output.name] = fitting[0].name
    return pairs if len(pairs) < len(signature.inputs) else {}


def _is_state(given: TensorSpec, made: TensorSpec) -> bool:
    if (given.shape, given.dtype) != (made.shape, made.dtype) or not given.dtype.startswith("f"):
        return False
    return bool(_stem(given.name)) and _stem(given.name) == _stem(made.name)


def _stem(name: str) -> tuple[str, ...]:
    """The words of a name that say which state it is: ``stateN``, ``state_out`` and ``prev_state`` are all ``state``;
    ``hn`` and ``h0`` are ``h``."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    words = [word.lower() for word in words]
    kept = [word for word in words if word not in _WAYS]
    if len(words) == 1 and len(words[0]) == 2 and words[0][1] in "nto":
        return (words[0][0],)
    if len(words) == 2 and len(words[0]) == 1 and words[1] == "0":
        return (words[0],)
    return tuple(kept)
