"""Named arrays over a pipe: eight bytes of length, then an uncompressed ``.npz``. Nothing in it is executed."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt


def write_arrays(stream: IO[bytes], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Send one message. Arrays of any shape."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **dict(arrays))  # type: ignore[arg-type]
    stream.write(struct.pack("<Q", content.tell()))
    stream.write(content.getbuffer())
    stream.flush()


def read_arrays(stream: IO[bytes]) -> dict[str, npt.NDArray[Any]] | None:
    """Receive one message; None when the other side is gone. Arrays of any shape."""
    import numpy as np

    header = stream.read(8)
    if len(header) < 8:
        return None
    (size,) = struct.unpack("<Q", header)
    content = stream.read(size)
    if len(content) < size:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}
