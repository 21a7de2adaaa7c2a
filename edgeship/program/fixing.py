"""Export a module as it is, or, where values decide how many rows its results have, with results of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.core.units import counted
from edgeship.errors import EdgeshipError, OpenSizeError, SourceError, UsageError
from edgeship.program.normalize import export_normalised
from edgeship.program.program import REMARK
from edgeship.program.watching import Watch

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from edgeship.core.model import Signature
    from edgeship.program.expected import Expected
    from edgeship.program.rows.wrapped import Told

# Folding batch norms and constants moves float32 results by rounding only.
MIN_EXPORT_SNR_DB = 80.0
CUT = "end the model before it with --cut NAME"


@dataclass(frozen=True)
class Whole:
    """A module's export, and what it has to answer.

    Args:
        wanted: the module's own answers, flat. told: of a module whose rows values choose; None where none are.
        candidates: how many boxes went into one suppression.
    """

    exported: ExportedProgram
    wanted: tuple[torch.Tensor, ...]
    told: Told | None = None
    candidates: int = 0

    def names(self, given: Sequence[str]) -> list[str]:
        """Names for all results: those given for the module's own, and one for each count of rows behind them.

        Raises:
            UsageError: too few or too many, or two alike.
        """
        count = len(self.wanted)
        made = list(given) or ["output" if i == 0 else f"output_{i}" for i in range(count)]
        extra = self.told.number if self.told else 0
        if len(made) not in (count, count + extra):
            raise UsageError(
                f"{counted(len(made), 'output name')} for {counted(count, 'output')}", fix="give one name an output"
            )
        if len(set(made)) != len(made):
            raise UsageError("two outputs have the same name", fix="give each --output-name once")
        if self.told is None or len(made) > count:
            return made
        from edgeship.program.rows.mode import count_names

        return [*made, *count_names(made, self.told.counts)]

    def same(self, name: str, index: int, found: Sequence[torch.Tensor]) -> bool:
        """Whether a result of the export is the module's: whole, or as many rows as count, with zeros behind them."""
        rows = self.told.counts[index] if self.told else None
        want, have = self.wanted[index], found[index]
        if rows is None:
            return same_values(name, want, have)
        place, axis = rows
        count = int(found[len(self.wanted) + place])
        if count > want.shape[axis] or (count < want.shape[axis] and not self._bounded):
            return False
        counted, rest = have.narrow(axis, 0, count), have.narrow(axis, count, have.shape[axis] - count)
        return same_values(name, want.narrow(axis, 0, count), counted) and not bool(rest.any())

    @property
    def _bounded(self) -> bool:
        """Whether some suppression was given more boxes than it looks at."""
        return self.told is not None and any(given > self.candidates for given in self.told.given)

    def _counted(self, place: int, names: Sequence[str]) -> list[str]:
        assert self.told is not None
        return [name for name, rows in zip(names, self.told.counts, strict=True) if rows and rows[0] == place]

    def remarks(self, signature: Signature) -> tuple[str, ...]:
        """What the report says of rows that values choose."""
        if self.told is None:
            return ()
        from edgeship.program.suppression import looked_at

        names = [spec.name for spec in signature.outputs]
        found: list[str] = []
        for place in range(self.told.number):
            held = self._counted(place, names[: len(self.wanted)])
            index = names.index(held[0])
            rows = self.told.counts[index]
            assert rows is not None
            size = signature.outputs[index].shape[rows[1]]
            count = names[len(self.wanted) + place]
            found.append(f"{REMARK}{', '.join(held)}: of {size} rows {count} count, the others are 0")
        return (*found, *(f"{REMARK}{line}" for line in looked_at(self.told.given, self.candidates)))


def export_whole(
    wrapper: Any,
    result: Any,
    examples: Sequence[torch.Tensor],
    names: tuple[str, ...],
    candidates: int,
    expected: dict[str, Expected],
) -> Whole:
    """Export a wrapped module (`model`, `answer`, flat `forward`); its rows are made fixed only where it must be.

    Args:
        result: what it answers on ``examples``. names: of the inputs. expected: see `export_normalised`.

    Raises:
        SourceError: it cannot be exported. OpenSizeError: nor with fixed rows; the way out names a module to end at.
    """
    import torch

    from edgeship.compat.torch import leaves_of

    def tensors(answer: Any) -> tuple[torch.Tensor, ...]:
        """Each in its own shape."""
        return tuple(leaf for leaf in leaves_of(answer) if isinstance(leaf, torch.Tensor))

    from edgeship.program.rows.wrapped import FixedRows, as_engines_order, suppresses

    first = OpenSizeError("values choose the rows of the model's results")
    if not suppresses(wrapper, examples):
        try:
            exported = export_normalised(wrapper, tuple(examples), names, prefix="model", expected=expected)
            return Whole(exported, tensors(result))
        except OpenSizeError as error:
            first = error

    fixed = FixedRows(wrapper.model, wrapper.answer, candidates).eval()
    watch = Watch(wrapper.model)
    expected.clear()
    try:
        with watch.running():
            exported = export_normalised(fixed, tuple(examples), names, prefix="model", expected=expected)
    except OpenSizeError as error:
        raise OpenSizeError(error.what, fix=_way_out(watch)) from error
    except EdgeshipError as error:
        raise OpenSizeError(f"{first.what}; with fixed rows: {error.what}", fix=_way_out(watch)) from error
    with torch.no_grad(), as_engines_order():
        wanted = tensors(wrapper.answer(*(example.clone() for example in examples)))
    return Whole(exported, wanted, fixed.told, candidates)


def _way_out(watch: Watch) -> str:
    last = watch.last()
    return f"end the model before it with --cut {last} (the last module that had ended)" if last else CUT


def same_values(name: str, want: torch.Tensor, have: torch.Tensor) -> bool:
    """Whether two outputs of one shape agree: integers exactly, floats to `MIN_EXPORT_SNR_DB`."""
    import torch

    if want.shape != have.shape:
        return False
    if not want.is_floating_point():
        return torch.equal(want, have)
    want, have = want.double(), have.double()
    if not torch.isfinite(want).all():
        raise SourceError(f"output {name} of the model is not finite on example inputs", fix="check weights and inputs")
    noise = float((want - have).pow(2).mean())
    signal = float(want.pow(2).mean())
    return noise <= signal * 10 ** (-MIN_EXPORT_SNR_DB / 10) or not want.numel()
