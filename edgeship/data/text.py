"""Text files as data for language models: windows of tokens, by the model's own tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeship.core.profile import DataRef
from edgeship.errors import DataError, SourceError

SUFFIXES = (".txt", ".md", ".text")


def is_text(reference: str) -> bool:
    """Whether a reference names a file of text."""
    return Path(reference).suffix.lower() in SUFFIXES and Path(reference).is_file()


def tokenized(data: DataRef, tokenizer: Path, length: int, folder: Path) -> DataRef:
    """A text file as an ``.npz`` of windows ``input_ids [N, length]``, one after another without overlap.

    Args:
        tokenizer: ``tokenizer.json``. folder: where the ``.npz`` goes, named by what it is made of.

    Raises:
        DataError: not text, or shorter than a window. SourceError: the tokenizer cannot be read.
    """
    import numpy as np
    from tokenizers import Tokenizer

    made = hashlib.sha256(f"{data.digest} {length} ".encode() + tokenizer.read_bytes()).hexdigest()
    path = folder / f"{made}.npz"
    if not path.is_file():
        try:
            text = Path(data.reference).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{data.reference} is not UTF-8 text", fix="convert it, or give an .npz") from None
        try:
            reader = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library's errors have no class of their own
            raise SourceError(f"{tokenizer.name} cannot be read: {error}", fix="save the tokenizer again") from None
        ids = np.array(reader.encode(text, add_special_tokens=False).ids, np.int64)
        count = len(ids) // length
        if count == 0:
            raise DataError(f"{data.reference} has {len(ids)} tokens, a window is {length}", fix="give a longer text")
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{hashlib.sha256(str(id(ids)).encode()).hexdigest()[:8]}.npz")
        np.savez(part, input_ids=ids[: count * length].reshape(count, length))
        part.rename(path)
    return DataRef(str(path), made)
