"""Which set of weights fits a module, and under which names: prefixes go, nothing is guessed by shape alone."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.core.units import counted
from edgeship.errors import SourceError, WeightsError
from edgeship.frontends.state_dicts import WeightSet

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

#: Components that wrappers of torch put into names: compiled, distributed, sharded and checkpointed parts.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COUNTER = "num_batches_tracked"
#: How many names are looked at for a prefix, how many prefixes are tried, and how many names an error shows.
_SAMPLE, _PREFIXES, _SHOWN = 40, 6, 3


@dataclass(frozen=True)
class Fit:
    """A set of weights held against a model.

    Args:
        key: how the user names it. names: the model's name -> the file's.
        missing: the model's names that the file lacks. stray: the file's that the model lacks.
        unlike: the model's name -> the file's, of another shape. outside: names of the file beyond the prefix.
    """

    weights: WeightSet
    key: str
    names: Mapping[str, str]
    missing: Sequence[str]
    stray: Sequence[str]
    unlike: Mapping[str, str]
    outside: Sequence[str]

    @property
    def holds(self) -> bool:
        """Whether every weight of the model is there, and nothing else."""
        return not self.missing and not self.stray and not self.unlike

    def identity(self) -> tuple[object, ...]:
        """Equal for two fits that give the model the same numbers."""
        return tuple(self.weights.same(self.names[name]) for name in sorted(self.names))


@dataclass(frozen=True)
class Wanted:
    """What a model wants.

    Args:
        shapes: by name. optional: counters that inference does not read. tied: a name -> others of the same numbers.
        spare: buffers that a state dict does not hold, with their shapes; old files have them all the same.
        plain: a name without what wrappers put into it -> the name.
    """

    shapes: Mapping[str, Shape]
    optional: frozenset[str]
    tied: Mapping[str, tuple[str, ...]]
    spare: Mapping[str, Shape]
    plain: Mapping[str, str]

    @classmethod
    def of(cls, module: torch.nn.Module) -> Wanted:
        """Of a module with its own values."""
        state = module.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        places: dict[tuple[object, ...], list[str]] = {}
        for name, value in state.items():
            if value.numel():
                place = (value.data_ptr(), tuple(value.shape), value.stride())
                places.setdefault(place, []).append(name)
        tied = {name: tuple(names) for names in places.values() for name in names if len(names) > 1}
        optional = frozenset(name for name in shapes if name.rpartition(".")[2] == _COUNTER)
        spare = {name: tuple(value.shape) for name, value in module.named_buffers() if name not in shapes}
        plain = {_without_wrappers(name): name for name in shapes}
        return cls(shapes, optional, tied, spare, plain)


def fill(module: torch.nn.Module, sets: Sequence[WeightSet], what: str, key: str = "") -> tuple[str, ...]:
    """Load the set that fits into a module, strictly. Shapes must be the module's.

    Args:
        what: names the file in errors. key: the set that the user chose.

    Returns:
        Remarks: which set was taken, and what was left out.

    Raises:
        SourceError: no set at all. WeightsError: none fits, several do, or the chosen one is not there.
    """
    if not sets:
        raise SourceError(f"{what} is not a state dict", fix="save model.state_dict()")
    wanted = Wanted.of(module)
    fit = choose([one for weights in sets for one in fits_of(weights, wanted)], wanted, what, key)
    state = {name: fit.weights.read(source) for name, source in fit.names.items()}
    for name, value in module.state_dict().items():
        other = next((item for item in wanted.tied.get(name, ()) if item in state), None)
        # A counter that old files lack, or a weight that another name has already.
        state.setdefault(name, value if other is None else state[other])
    module.load_state_dict(state, strict=True)
    return tuple(_remarks(fit, what))


def choose(fits: Sequence[Fit], wanted: Wanted, what: str, key: str) -> Fit:
    """The one fit that holds. Raises `WeightsError` for none or several."""
    if key:
        known = list(dict.fromkeys(fit.key for fit in fits if fit.key))
        fits = [fit for fit in fits if key in (fit.key, fit.weights.key)]
        if not fits:
            listed = ", ".join(known[:8]) or "only one set, which has no key"
            raise WeightsError(f"{what} holds no weights under {key!r}", fix=f"it has {listed}")
    distinct = {fit.identity(): fit for fit in reversed(fits) if fit.holds}
    holding = list(reversed(distinct.values()))
    if len(holding) > 1:
        keys = [fit.key or "the whole file" for fit in holding]
        raise WeightsError(
            f"{what} holds {len(holding)} sets of weights that fit the model: {', '.join(keys[:6])}",
            fix=f"choose one, such as --weights-key {next((fit.key for fit in holding if fit.key), 'model')}",
        )
    if not holding:
        best = max(fits, key=lambda fit: (len(fit.names), -len(fit.stray)))
        raise WeightsError(_misfit(best, wanted, what), fix="give the checkpoint of this model")
    return holding[0]


def fits_of(weights: WeightSet, wanted: Wanted) -> list[Fit]:
    """A set held against a model under each prefix that its names suggest; under its own names first."""
    plain = _held(weights, wanted, "", "")
    if plain.holds:
        return [plain]
    found = [plain]
    for prefix in _prefixes(weights.shapes, wanted.shapes):
        found.append(_held(weights, wanted, prefix, ""))
    # The model may be a part of ours: a factory that puts its module into another.
    for prefix in _prefixes(wanted.shapes, weights.shapes):
        found.append(_held(weights, wanted, "", prefix))
    return found


def _prefixes(longer: Iterable[str], shorter: Iterable[str]) -> list[str]:
    """What stands in front of the shorter names in the longer ones, the most frequent first."""
    # The longest names say most: `weight` ends a hundred others.
    sample = sorted(shorter, key=lambda name: (-name.count("."), name))[:_SAMPLE]
    counts: Counter[str] = Counter()
    plain = [_without_wrappers(name) for name in longer]
    for name in plain:
        for end in sample:
            if name.endswith(f".{end}"):
                counts[name[: -len(end)]] += 1
    return [prefix for prefix, _ in counts.most_common(_PREFIXES)]


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _held(weights: WeightSet, wanted: Wanted, gone: str, added: str) -> Fit:
    """A set held against a model, where ``gone`` goes from the file's names and ``added`` comes in front of them."""
    names: dict[str, str] = {}
    unlike: dict[str, str] = {}
    stray: list[str] = []
    outside: list[str] = []
    for source, shape in weights.shapes.items():
        own = source if source in wanted.shapes and not gone else _without_wrappers(source)
        if not own.startswith(gone):
            outside.append(source)
            continue
        spelled = added + own[len(gone) :]
        name = wanted.plain.get(spelled, spelled)
        if name in names:
            stray.append(source)
        elif name not in wanted.shapes:
            # What is no part of a state dict, or of inference, is nothing that the model lacks.
            known = wanted.spare.get(name) == shape or name.rpartition(".")[2] in (_COUNTER, "n_averaged")
            if not known:
                stray.append(source)
        elif wanted.shapes[name] != shape:
            unlike[name] = source
        else:
            names[name] = source
    covered = {other for name in names for other in wanted.tied.get(name, ())}
    missing = [
        name
        for name in wanted.shapes
        if name not in names and name not in unlike and name not in wanted.optional and name not in covered
    ]
    inner = ".".join(part for part in (weights.key, gone.rstrip(".")) if part)
    return Fit(weights, inner, names, missing, stray, unlike, outside)


def _remarks(fit: Fit, what: str) -> Iterable[str]:
    """What a user should know of the set that was taken."""
    if fit.key:
        yield f"the weights are {fit.key!r} in {what}"
    if fit.weights.module:
        yield f"{what} is a pickled module, {fit.weights.module}: its weights were taken, its code was not run"
    if fit.outside:
        yield f"{counted(len(fit.outside), 'tensor')} of {what} beside them left out, such as {fit.outside[0]}"


def _misfit(fit: Fit, wanted: Wanted, what: str) -> str:
    """Why a set does not fit: the first fault, how many there are, and names of the file beside the model's."""
    where = f"{what} ({fit.key})" if fit.key else what
    shapes = fit.weights.shapes
    if fit.missing:
        first = f"{where} lacks the weight {fit.missing[0]}"
    elif fit.unlike:
        name, source = next(iter(fit.unlike.items()))
        first = f"{where}: {source} has shape {shapes[source]}, the model wants {wanted.shapes[name]}"
    else:
        first = f"{where} holds {fit.stray[0]}, which the model does not have"
    counts = [
        f"{len(group)} {word}"
        for group, word in ((fit.missing, "missing"), (fit.unlike, "of another shape"), (fit.stray, "unknown"))
        if group
    ]
    told = f"{first}; of its {len(wanted.shapes)} weights {len(fit.names)} fit, {', '.join(counts)}"
    pairs = [f"{source} for {name}" for name, source in _nearest(fit, wanted)]
    return f"{told}; nearest names in the file: {', '.join(pairs)}" if pairs else told


def _nearest(fit: Fit, wanted: Wanted) -> Iterable[tuple[str, str]]:
    """Up to three of the model's names that are missing, each with the nearest of the file's that nothing takes."""
    free = list(fit.stray)
    for name in list(fit.missing)[:_SHOWN]:
        alike = [source for source in free if fit.weights.shapes[source] == wanted.shapes[name]]
        close = difflib.get_close_matches(name, alike or free, n=1, cutoff=0.3)
        if close:
            free.remove(close[0])
            yield name, close[0]
