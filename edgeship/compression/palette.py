"""Palettes by k-means in one dimension, weighted by how much each weight matters.

With weights from the diagonal of a layer's Hessian this is the sensitivity-weighted clustering of SqueezeLLM (Kim et
al. 2023, arXiv:2306.07629); with none it is plain k-means. Tables are rounded to float16, the form in which artifacts
store them, before the indices are final.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.core.weights import Palette, PaletteTensor
from edgeship.errors import EncodingError, WeightsError

if TYPE_CHECKING:
    import torch

ITERATIONS = 40
DENSITY_BINS = 512
# Weights that are clustered together, for the memory that their running sums take.
AT_ONCE = 1 << 22


def palettize(
    weight: torch.Tensor, encoding: Palette, *, importance: torch.Tensor | None = None, name: str = "weight"
) -> PaletteTensor:
    """Cluster a weight into look-up tables.

    Args:
        weight: any shape, output channels first. importance: same shape, not negative; how much an error there costs.

    Raises:
        EncodingError: the channels of a group do not divide the output channels. WeightsError: not finite, or beyond
            float16.
    """
    import torch

    table = choose_table(weight, encoding, importance=importance, name=name)
    rows = weight.detach().to(torch.float32).reshape(table.shape[0], -1)
    # [groups, n], then the shape of the weight
    indices = nearest_entry(rows, table)
    return PaletteTensor(indices.to(torch.uint8).reshape(weight.shape).numpy(), table.numpy(), encoding)


def choose_table(
    weight: torch.Tensor, encoding: Palette, *, importance: torch.Tensor | None = None, name: str = "weight"
) -> torch.Tensor:
    """The look-up tables alone, ``(groups, 2**bits)``, sorted and on the float16 grid; as `palettize`."""
    import torch

    value = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(value).all()) or float(value.abs().max()) > 65504:
        raise WeightsError(f"{name} holds NaN, infinity or values beyond float16", fix="scale or retrain the layer")
    channels = encoding.group_channels or value.shape[0]
    if value.shape[0] % channels:
        raise EncodingError(
            f"{channels} channels a palette do not divide the {value.shape[0]} output channels of {name}",
            fix="use one palette for the tensor",
        )
    # [out, ...] -> [groups, numbers that share a table]
    rows = value.reshape(value.shape[0] // channels, -1)
    costs = None if importance is None else importance.detach().float().reshape(rows.shape)
    step = max(1, AT_ONCE // rows.shape[1])
    made = [
        _cluster(part, torch.ones_like(part) if costs is None else costs[i * step : (i + 1) * step], 1 << encoding.bits)
        for i, part in enumerate(torch.split(rows, step))
    ]
    table = torch.cat(made)
    return table.to(torch.float16).to(torch.float32).sort(dim=1).values


def _cluster(rows: torch.Tensor, cost: torch.Tensor, entries: int) -> torch.Tensor:
    """Lloyd's algorithm on each row from two starts, the better table kept; ``(groups, entries)``, deterministic."""
    import torch

    shares = (torch.arange(entries, dtype=torch.float32) + 0.5) / entries
    line = _Line(rows, cost)
    # Few distinct values are found by quantiles, distributions by their density.
    quantiles = line.values[:, (shares * (rows.shape[1] - 1)).round().long()]
    # Two starts, [groups, entries] each; rows keep the better one.
    tables = [line.lloyd(start) for start in (quantiles, _by_density(rows, cost, shares))]
    errors = [line.error(table) for table in tables]
    return torch.where(errors[1] < errors[0], tables[1], tables[0])


class _Line:
    """Weights in order with running sums: what an entry is nearest to is a stretch, whose sums are two differences."""

    def __init__(self, rows: torch.Tensor, cost: torch.Tensor) -> None:
        """``rows`` and ``cost``: [groups, n]."""
        self.values, order = rows.sort(dim=1)
        ordered = cost.gather(1, order)
        del order
        self.mass, self.total = _running(ordered), _running(ordered * self.values)
        self.square = (ordered.double() * self.values.double().square()).sum(1, keepdim=True)

    def _stretches(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the costs, and of cost times value, of what is nearest to each entry.

        ``table`` [groups, entries] -> two of [groups, entries].
        """
        import torch

        # Between two entries the nearer one changes: [groups, entries - 1].
        middles = (table[:, 1:] + table[:, :-1]) / 2
        inner = torch.searchsorted(self.values, middles.contiguous(), right=True)
        edges = torch.nn.functional.pad(inner, (1, 0))
        edges = torch.nn.functional.pad(edges, (0, 1), value=self.values.shape[1])
        return self.mass.gather(1, edges).diff(dim=1), self.total.gather(1, edges).diff(dim=1)

    def lloyd(self, table: torch.Tensor) -> torch.Tensor:
        """Entries moved to the weighted mean of what they are nearest to, again and again. [groups, entries]."""
        import torch

        for _ in range(ITERATIONS):
            mass, total = self._stretches(table)
            # An entry that nobody uses stays where it is.
            means = (total / mass.clamp(min=1e-30)).float()
            moved = torch.where(mass > 0, means, table).sort(dim=1).values
            if bool(torch.equal(moved, table)):
                break
            table = moved
        return table

    def error(self, table: torch.Tensor) -> torch.Tensor:
        """The squared errors of a table, one sum a row."""
        mass, total = self._stretches(table)
        # The square of what is left, multiplied out: values**2 - 2 * values * entry + entry**2.
        wide = table.double()
        return self.square + (wide * (wide * mass - 2 * total)).sum(1, keepdim=True)


def _running(values: torch.Tensor) -> torch.Tensor:
    """Sums of all before each place, in float64: their differences are small. [rows, n] -> [rows, n + 1]."""
    import torch

    return torch.nn.functional.pad(values.double().cumsum(1), (1, 0))


def _by_density(rows: torch.Tensor, cost: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Entries as dense as the cube root of what lies there, which is best when they are many (Panter & Dite 1951).

    ``rows`` and ``cost`` [groups, n], ``shares`` [1, entries] -> [groups, entries].
    """
    import torch

    low = rows.amin(1, keepdim=True)
    step = ((rows.amax(1, keepdim=True) - low) / DENSITY_BINS).clamp(min=1e-30)
    place = ((rows - low) / step).long().clamp(0, DENSITY_BINS - 1)
    # A histogram of each row, weighted by cost: [groups, bins].
    mass = torch.zeros(rows.shape[0], DENSITY_BINS).scatter_add_(1, place, cost)
    risen = mass.pow(1 / 3).cumsum(1)
    # [1, entries] x [groups, 1] -> [groups, entries]
    wanted = shares * risen[:, -1:]
    return low + step * (torch.searchsorted(risen, wanted).clamp(max=DENSITY_BINS - 1) + 0.5)


def nearest_entry(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of a sorted table, row by row."""
    import torch

    middles = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), rows.contiguous())
