"""What programs answer, left by one step of a build for the others.

Each runtime's checks ask the same original, and mostly the same reference, the same questions. A file holds one answer;
its name is a digest of the program, of how it is run and of the inputs, so it is never another's.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

try:
    import fcntl
except ImportError:  # a system without flock: two steps may work out the same, and one is kept
    fcntl = None  # type: ignore[assignment]

# An answer larger than this is worked out again: logits of a long text.
MAX_BYTES = 64 << 20
# The text that goes with an answer, beside the names of its arrays.
TEXT = "text"


class Answers:
    """Answers of one program.

    Args:
        folder: where steps of this build leave them; None keeps nothing.
        made_of: what decides the answers beside the inputs: the program's digest first, and how it is run. Without a
            digest nothing is kept.
    """

    def __init__(self, folder: Path | None, *made_of: str) -> None:
        self._folder = folder if made_of and made_of[0] else None
        self._made_of = made_of

    @property
    def keeps(self) -> bool:
        """Whether answers are kept at all."""
        return self._folder is not None

    def of(
        self, inputs: Mapping[str, Array], make: Callable[[], tuple[dict[str, Array], str]], *how: object
    ) -> tuple[dict[str, Array], str]:
        """The answer to inputs, as it was left or as ``make`` works it out, and the text that goes with it.

        Args:
            how: what else decides it. inputs, and the arrays of the answer: by name, of any shape.
        """
        if self._folder is None:
            return make()
        path = self._folder / f"{self._digest(inputs, how)}.npz"
        with _alone(path.with_suffix(".lock")):
            found = _read(path)
            if found is None:
                found = make()
                _write(path, *found)
        return found

    def _digest(self, inputs: Mapping[str, Array], how: tuple[object, ...]) -> str:
        digest = hashlib.sha256(repr((self._made_of, how)).encode())
        for name, value in sorted(inputs.items()):
            digest.update(repr((name, value.dtype.str, value.shape)).encode() + value.tobytes())
        return digest.hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one step at a time work an answer out: the others wait for it. A step that is killed lets go."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, Array], str] | None:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as kept:
            names = kept["names"].tolist()
            return {name: kept[f"a{number}"] for number, name in enumerate(names)}, str(kept[TEXT])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # nobody left it yet


def _write(path: Path, arrays: Mapping[str, Array], text: str) -> None:
    """Leave an answer, whole or not at all; on a full disk it is worked out again."""
    import numpy as np

    if sum(value.nbytes for value in arrays.values()) > MAX_BYTES:
        return
    named: dict[str, Any] = {f"a{number}": value for number, value in enumerate(arrays.values())}
    draft = path.with_suffix(".tmp.npz")
    with suppress(OSError):
        np.savez(draft, names=np.array(list(arrays)), text=np.array(text), **named)
        draft.replace(path)
