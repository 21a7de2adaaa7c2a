"""An encoding in the words that compress/quantize takes: ``form``, ``bits`` and the others, or a short name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from edgeship.core.encodings.affine import Affine, Granularity
from edgeship.core.encodings.families import encoding_named
from edgeship.core.encodings.family import Encoding
from edgeship.core.encodings.floats import Float
from edgeship.core.encodings.palette import Palette

Form = Literal["float16", "float32", "int", "palette", "auto"]
FLOATS = ("float16", "float32")
# Input channels that share a scale where nobody says how many.
GROUP = 32


@dataclass(frozen=True)
class Words:
    """What is said of an encoding.

    Args:
        form: ``float16``, ``float32``; ``int``, an affine grid of ``bits``; ``palette``, a table of ``2**bits`` values.
        granularity, group_size: how far one scale reaches. symmetric: zero point 0.
        group_channels: output channels that share a palette.
        encoding: a short name that says all of it; the others count for nothing then.
    """

    form: Form = "int"
    bits: int = 8
    granularity: Granularity = "channel"
    group_size: int | None = None
    group_channels: int | None = None
    symmetric: bool = True
    encoding: str = ""

    @classmethod
    def of(cls, encoding: Encoding) -> Words:
        """The words for an encoding; its short name where it has no others."""
        if isinstance(encoding, Float):
            return cls("float16" if encoding.bits == 16 else "float32", encoding.bits)
        if isinstance(encoding, Palette):
            return cls("palette", encoding.bits, group_channels=encoding.group_channels)
        if isinstance(encoding, Affine):
            grid = encoding
            return cls("int", grid.bits, grid.granularity, grid.group_size, symmetric=grid.symmetric)
        return cls(encoding=encoding.short_name)

    def changed(self, given: Mapping[str, Any]) -> Words:
        """These words with what an option says in place of some: the words of another encoding where it names one.

        Args:
            given: options of compress/quantize; those that are no words count for nothing.
        """
        if given.get("encoding"):
            return replace(Words.of(encoding_named(given["encoding"])), encoding=given["encoding"])
        mine = {field.name: given[field.name] for field in fields(self) if field.name in given}
        # A float's width is none of integers.
        eight = self.form in FLOATS and mine.get("form") in ("int", "palette")
        return replace(self, **{"bits": 8, **mine} if eight else mine)

    def meant(self) -> Encoding:
        """The encoding. Raises `EncodingError` where there is none such, `UsageError` for a short name of none."""
        if self.encoding:
            return encoding_named(self.encoding)
        if self.form in FLOATS:
            return Float(int(self.form[5:]))
        if self.form == "palette":
            return Palette(self.bits, self.group_channels)
        grouped = self.granularity == "group"
        return Affine(self.bits, self.symmetric, self.granularity, (self.group_size or GROUP) if grouped else None)
