"""Which encodings a format stores, and how: one row a family. What has no row is refused.

A row is a `Form`: how weights of the family lie in the file, what they take there and in memory, and which of them are
refused all the same. `Lacks` says why a family is not stored at all. `Runtime.holds` asks the table while planning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

from edgeship.core.encodings.family import Encoding

if TYPE_CHECKING:
    from edgeship.core.encodings.family import EncodedTensor, Translated
    from edgeship.core.inventory import WeightOp

ActivationMode = Literal["float", "int8", "int16", "dynamic"]
#: Modes whose activations lie on grids that are decided while building.
STATIC_MODES: tuple[ActivationMode, ...] = ("int8", "int16")
E = TypeVar("E", bound=Encoding)


class Form(Generic[E]):
    """How a format stores the weights of one family.

    Class attributes:
        family: the class of its encodings.
        how: what it is in the file, in the format's own words.
    """

    family: ClassVar[type[Encoding]]
    how: ClassVar[str]

    def refusal(self, op: WeightOp, encoding: E, activations: ActivationMode) -> str:
        """Empty when a weight of ``op`` is stored so, exactly and safely; else the reason why not."""
        return ""

    def container_bits(self, op: WeightOp, encoding: E) -> int:
        """Bits a number takes in the file: more than decided where the format lacks that width (int3 in int4)."""
        return encoding.bits

    def scale_bits(self, encoding: E) -> int:
        """Bits a scale takes in the file."""
        return 16

    def resident_bits(self, op: WeightOp, encoding: E, activations: ActivationMode) -> int:
        """Bits a number takes in memory while the model runs: more than stored where the engine decompresses it."""
        return self.container_bits(op, encoding)

    def unpacks(self, op: WeightOp, encoding: E, activations: ActivationMode) -> bool:
        """Whether a weight is unpacked again at every run, which takes longer than computing in float32."""
        return False


@dataclass(frozen=True)
class Lacks:
    """A family that a format does not store: why not, and what it has instead."""

    family: type[Encoding]
    reason: str


@dataclass(frozen=True)
class Forms:
    """The table of one format: a row for each family that it knows.

    A family without a row is stored in the form of another, where it says which one holds the same numbers
    (`Encoding.stored_as`) and that one has a row; else it is refused.
    """

    rows: tuple[Form[Any] | Lacks, ...] = ()

    def __iter__(self) -> Iterator[Form[Any] | Lacks]:
        return iter(self.rows)

    def replaced(self, *rows: Form[Any] | Lacks) -> Forms:
        """The table with other rows for the families of ``rows``."""
        new = {row.family: row for row in rows}
        old = [row for row in self.rows if row.family not in new]
        return Forms((*old, *rows))

    def row(self, family: type[Encoding]) -> Form[Any] | Lacks | None:
        """The row of a family; None where the table does not know it."""
        return next((row for row in self.rows if row.family is family), None)

    def in_the_file(self, encoding: Encoding) -> Encoding:
        """The encoding that a file says: ``encoding``, or the one of another family in whose form it is stored."""
        other = encoding.stored_as
        known = self.row(type(encoding)) is not None
        return encoding if known or other is None else other

    def translated(self, tensor: EncodedTensor) -> EncodedTensor:
        """The tensor that a file holds: ``tensor``, or the same numbers in another family's encoding."""
        if self.in_the_file(tensor.encoding) == tensor.encoding:
            return tensor
        return cast("Translated", tensor).stored_as()

    def refusal(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """Empty when a weight of ``op`` is stored so, exactly and safely; else the reason why not."""
        stored = self.in_the_file(encoding)
        row = self.row(type(stored))
        if row is None:
            return f"nothing says how its files store weights of the family {encoding.kind}"
        reason = row.reason if isinstance(row, Lacks) else row.refusal(op, stored, activations)
        return f"it is stored as {stored}, and {reason}" if reason and stored != encoding else reason

    def container_bits(self, op: WeightOp, encoding: Encoding) -> int:
        """Bits a number takes in the file; those decided where the family is refused."""
        stored, form = self._form(encoding)
        return encoding.bits if form is None else form.container_bits(op, stored)

    def scale_bits(self, encoding: Encoding) -> int:
        """Bits a scale takes in the file."""
        stored, form = self._form(encoding)
        return 16 if form is None else form.scale_bits(stored)

    def resident_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits a number takes in memory while the model runs; those decided where the family is refused."""
        stored, form = self._form(encoding)
        return encoding.bits if form is None else form.resident_bits(op, stored, activations)

    def unpacks(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> bool:
        """Whether a weight is unpacked again at every run."""
        stored, form = self._form(encoding)
        return form is not None and form.unpacks(op, stored, activations)

    def _form(self, encoding: Encoding) -> tuple[Encoding, Form[Any] | None]:
        stored = self.in_the_file(encoding)
        row = self.row(type(stored))
        return stored, row if isinstance(row, Form) else None
