"""Text files as data for language models: windows of tokens, by the model's own tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeship.core.profile import DataRef
from edgeship.data.numpy_files import write_npz
from edgeship.errors import ChangedError, DataError, SourceError

SUFFIXES = (".txt", ".md", ".text")
WINDOWS = "windows.npz"


def is_text(reference: str) -> bool:
    """Whether a reference names a file of text."""
    return Path(reference).suffix.lower() in SUFFIXES and Path(reference).is_file()


def tokenized(data: DataRef, tokenizer: Path, length: int, folder: Path) -> Path:
    """A text file as an ``.npz`` of windows ``input_ids [N, length]``, one after another without overlap.

    Args:
        tokenizer: ``tokenizer.json``. folder: where the ``.npz`` goes; the same text gives the same bytes.

    Raises:
        ChangedError: the text is no longer what ``data`` says. DataError: not text, or shorter than a window.
        SourceError: the tokenizer cannot be read.
    """
    import numpy as np
    from tokenizers import Tokenizer

    text = _read(data)
    try:
        reader = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library's errors have no class of their own
        raise SourceError(f"{tokenizer.name} cannot be read: {error}", fix="save the tokenizer again") from None
    ids = np.array(reader.encode(text, add_special_tokens=False).ids, np.int64)
    count = len(ids) // length
    if count == 0:
        raise DataError(f"{data.shown} has {len(ids)} tokens, a window is {length}", fix="give a longer text")
    path = folder / WINDOWS
    # [tokens] -> [windows, length]
    return write_npz(path, {"input_ids": ids[: count * length].reshape(count, length)})


def _read(data: DataRef) -> str:
    """The text, whose bytes are those that were described."""
    try:
        content = Path(data.reference).read_bytes()
    except OSError as error:
        raise DataError(f"{data.reference} cannot be read: {error.strerror}", fix="check the path") from None
    if hashlib.sha256(content).hexdigest() != data.digest:
        raise ChangedError(f"{data.reference} changed while the build read it", fix="run the same command again")
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise DataError(f"{data.reference} is not UTF-8 text", fix="convert it, or give an .npz") from None
