"""Choose an encoding for every layer that loses least within a number of bytes: an integer programme (HiGHS).

One binary variable for each (layer, option): exactly one option a layer, bytes at most the budget, the sum of losses as
small as it can be. Losses are measured one layer at a time and added, as in HAWQ-V3 (Yao et al. 2021,
arXiv:2011.10680).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeship.core.units import human_bytes
from edgeship.core.weights import Encoding
from edgeship.errors import GateError


@dataclass(frozen=True)
class Option:
    """One way to store one layer: its bytes, and what the model loses by it."""

    encoding: Encoding
    bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """An option for every layer, with the sums."""

    chosen: dict[str, Option]
    bytes: int
    loss: float


def allocate(layers: Mapping[str, Sequence[Option]], max_bytes: int) -> Allocation:
    """The options with the least loss whose bytes fit.

    Raises:
        GateError: even the smallest options do not fit; says what the smallest would take.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    smallest = sum(_smallest(options).bytes for options in layers.values())
    if smallest > max_bytes:
        raise GateError(
            f"no choice of encodings fits {human_bytes(max_bytes)}", fix=f"the smallest takes {human_bytes(smallest)}"
        )
    pairs = [(name, option) for name, options in layers.items() for option in options]
    if not pairs:
        return Allocation({}, 0, 0.0)
    row_of = {name: index for index, name in enumerate(layers)}
    rows = [row_of[name] for name, _ in pairs]
    columns = range(len(pairs))
    # [layers, pairs]: a one where the pair is an option of the layer.
    pick = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(row_of), len(pairs)))
    # [1, pairs]
    size = np.array([[option.bytes for _, option in pairs]], dtype=float)
    losses = np.array([option.loss for _, option in pairs])
    # Scaled, so that the solver's tolerances mean the same for 10 kB and for 3 GB.
    scale = float(np.abs(losses).max()) or 1.0
    # Each layer's options sum to one, and the chosen bytes stay within the budget.
    found = milp(
        losses / scale,
        constraints=[LinearConstraint(pick, 1, 1), LinearConstraint(size / max_bytes, 0, 1)],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise GateError(f"the budget could not be solved: {found.message}", fix="raise --max-size a little")
    chosen = {name: option for (name, option), share in zip(pairs, found.x, strict=True) if share > 0.5}
    total_bytes = sum(option.bytes for option in chosen.values())
    total_loss = sum(option.loss for option in chosen.values())
    return Allocation(chosen, total_bytes, total_loss)


def trade_off(layers: Mapping[str, Sequence[Option]], points: int = 12) -> list[Allocation]:
    """The curve from the smallest allocation to the best, at budgets evenly spaced in bytes; loss never rises."""
    low = sum(_smallest(options).bytes for options in layers.values())
    high = sum(_best(options).bytes for options in layers.values())
    found = {}
    for step in range(points):
        budget = low + (high - low) * step // max(points - 1, 1)
        if budget not in found:
            found[budget] = allocate(layers, budget)
    return list(found.values())


def _smallest(options: Sequence[Option]) -> Option:
    return min(options, key=lambda option: option.bytes)


def _best(options: Sequence[Option]) -> Option:
    """The option that loses least; of equal ones the smallest."""
    return min(options, key=lambda option: (option.loss, option.bytes))
