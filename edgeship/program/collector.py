"""Keep Python's cycle collector from walking everything again and again while a graph is traced."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Python 3.12 starts with some 400 frozen objects of its own; whoever freezes what there is has many thousands.
_PYTHONS_OWN = 2000


@contextmanager
def few_collections() -> Iterator[None]:
    """Inside, what exists already is left out of collections; what is made is collected as always.

    torch and transformers hold millions of objects, and tracing makes so many that the oldest of them are walked every
    few seconds: about 8 % of the time of an export.
    """
    if gc.get_freeze_count() > _PYTHONS_OWN:
        # Somebody froze what there was, an outer block perhaps: to thaw ours would thaw theirs.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quick_tracing() -> Iterator[None]:
    """Inside, a program is traced and decomposed without collections of what exists, and by torch's quicker tables."""
    from edgeship.compat.torch import quick_decompositions

    with few_collections(), quick_decompositions():
        yield
