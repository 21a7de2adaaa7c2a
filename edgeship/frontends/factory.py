"""Call a user's function that returns a model. Whatever it raises becomes one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.data.functions import load_function
from edgeship.errors import SourceError

if TYPE_CHECKING:
    import torch


def call_factory(reference: str) -> torch.nn.Module:
    """The module that ``file.py:function`` or ``package.module:function`` returns, made with a fixed seed.

    Raises:
        UsageError: there is no such function. SourceError: it fails, or returns something else.
    """
    import torch

    from edgeship.compat.torch import seeded

    # The file may draw numbers while it is imported, and the function goes on from there.
    with seeded(0):
        function = load_function(reference)
        try:
            module = function()
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise SourceError(f"{reference} failed: {reason}", fix="run it with python to see where") from error
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"{reference} returned {type(module).__name__}", fix="return an nn.Module")
    return module
