"""An artifact answers beside its references: on given inputs, noise, probes, and with its states fed back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Artifact
from edgeship.core.passes import Context
from edgeship.core.runtimes import Session, as_numpy
from edgeship.errors import SourceError
from edgeship.program.answers import Answers
from edgeship.program.chosen import row_sets
from edgeship.program.compare import Comparison, Reference
from edgeship.program.conditioning import UNIT, Peak, Trembling, WeightMoves
from edgeship.program.detections import SAME, RowTrial, Tally
from edgeship.program.routers import WITHIN
from edgeship.program.saturation import Saturation

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.program.program import TorchProgram

    Batch = Mapping[str, npt.NDArray[Any]]

GIVEN = "the given inputs"
NOISE = "noise"
FED_BACK = "32 steps with states fed back"
STEPS = 32
# The second engine and adapters are compared on so many inputs.
FEW = 4
# How often the original is moved again where an artifact fell short: what one rounding does may be 10 dB from another.
MORE_DRAWS = 4
# Rows that come or go when values are moved by so many roundings, or by that share of themselves, are chosen by a hair:
# a sum of large numbers loses more than one rounding of what it comes to.
HAIR, LEAST_HAIR = 8.0, 2.0**-12
# Where experts are chosen by a hair at more of a text's positions than this, all are compared (`program.routers`).
MOST_LEFT_OUT = 0.5


@dataclass(frozen=True)
class Questions:
    """What an artifact is asked.

    Args:
        given: inputs from the user's data. drawn: noise. probes: kind -> inputs of it. states: output -> input.
        far: kinds of probes that are far from what networks are fed with.
    """

    given: Sequence[Batch]
    drawn: Sequence[Batch]
    probes: Mapping[str, Batch]
    states: Mapping[str, str]
    far: Collection[str] = ()

    @property
    def usual(self) -> list[Batch]:
        """Given inputs, then noise."""
        return [*self.given, *self.drawn]


@dataclass
class Kind:
    """The comparisons on one kind of inputs.

    Args:
        lowering: with the reference that holds the same numbers. total: with the original.
        own, own_total: how far the reference and the original move by rounding alone; None where that is not asked.
        peak: where the original is largest. beyond: which static grid the inputs leave; empty when none.
        refused: what the engine said when it did not answer.
        rows, rows_total: chosen rows that the reference and the original have too.
    """

    lowering: Comparison = field(default_factory=Comparison)
    total: Comparison = field(default_factory=Comparison)
    own: Comparison | None = None
    own_total: Comparison | None = None
    peak: Peak = field(default_factory=Peak)
    beyond: str = ""
    refused: str = ""
    rows: Tally = field(default_factory=Tally)
    rows_total: Tally = field(default_factory=Tally)


@dataclass
class Trial:
    """What the comparisons of one artifact found.

    Args:
        large: the program is too large for memory as a whole: no probes, no slices.
        kinds: by kind of inputs. lowering, total: over all usual inputs; the total over the given ones where there are
            any. engines: the artifact beside a second engine.
        adapters: by name. idle: adapters that the engine ignored.
        not_asked: kinds that the original cannot run on, with its words.
        positions: of texts. close: those left out because experts are chosen by a hair. crowded: those that would have
            been, in texts with so many that all were compared.
        by_hand: a limit is the user's own, and none is lowered. kept, kept_reference: what others have asked the
            original and the reference.
    """

    program: TorchProgram
    original: TorchProgram
    arithmetic: str
    large: bool
    decided: Reference
    loaded: Reference
    kinds: dict[str, Kind] = field(default_factory=dict)
    lowering: Comparison = field(default_factory=Comparison)
    total: Comparison = field(default_factory=Comparison)
    engines: Comparison = field(default_factory=Comparison)
    adapters: dict[str, Comparison] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    not_asked: dict[str, str] = field(default_factory=dict)
    positions: int = 0
    close: int = 0
    crowded: int = 0
    by_hand: bool = False
    kept: Answers = field(default_factory=lambda: Answers(None))
    kept_reference: Answers = field(default_factory=lambda: Answers(None))
    _plain: list[tuple[Batch, Any, Any]] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        program: TorchProgram,
        original: TorchProgram,
        arithmetic: str,
        questions: Questions,
        *,
        by_hand: bool = False,
        kept: tuple[Answers, Answers] | None = None,
    ) -> Trial:
        """Open both references; a program too large for memory answers all usual inputs in one go.

        Args:
            kept: what other steps of the build have asked the program and the original.
        """
        from edgeship.program.streamed import is_large

        usual = questions.usual
        ours, originals = kept or (Answers(None), Answers(None))
        decided = Reference(program, ahead=usual, kept=ours)
        loaded = Reference(original, ahead=questions.given or usual, kept=originals)
        if program.record.decoder is not None:
            # Nothing but texts is asked: no two models and an engine in memory at once.
            decided.leave(usual)
            loaded.leave(usual)
        return cls(
            program,
            original,
            arithmetic,
            is_large(program),
            decided,
            loaded,
            by_hand=by_hand,
            kept=originals,
            kept_reference=ours,
        )

    @property
    def static(self) -> bool:
        """Whether the artifact has static integer grids."""
        return bool(self.program.activations)

    @property
    def narrow(self) -> bool:
        """Whether weights have 8 bits or fewer."""
        return any(encoding.bits <= 8 for encoding in self.program.record.encodings.values())

    @property
    def unit(self) -> float:
        """To what share of itself the arithmetic rounds a value."""
        return UNIT.get(self.arithmetic, UNIT["dynamic"])

    @property
    def weights_unit(self) -> float:
        """The same with the rounding of stored weights."""
        return max(self.unit, UNIT["int8"] if self.narrow else UNIT["f16"])

    @property
    def halves(self) -> bool:
        """Whether the artifact computes in float16."""
        return self.arithmetic == "f16"

    @property
    def coarse(self) -> bool:
        """Whether its static grids have 8 bits."""
        return any(grid.bits <= 8 for grid in self.program.activations.values())

    @cached_property
    def moved(self) -> Trembling:
        """The original with its values moved."""
        return Trembling(self.original, self.kept)

    @cached_property
    def rows(self) -> RowTrial:
        """The rows that the program chooses by scores."""
        sets = () if self.large or self.program.record.decoder is not None else row_sets(self.program)
        reference = Trembling(self.program, self.kept_reference)
        unit = min(max(HAIR * self.unit, LEAST_HAIR), UNIT["int8"])
        seeds = range(1, MORE_DRAWS + 1)

        def near(batch: Batch) -> list[Batch]:
            """The reference's answers; shapes are the signature's."""
            return [reference.run(batch, unit, seed=seed)[0] for seed in seeds]

        def far(batch: Batch) -> list[Batch]:
            """The original's answers; shapes are the signature's."""
            width = max(unit, self.weights_unit)
            return [self.moved.run(batch, width, weights="share", seed=seed)[0] for seed in seeds]

        return RowTrial(sets, SAME.get(self.arithmetic, SAME["dynamic"]), near, far)

    @property
    def rows_near(self) -> Tally:
        """Chosen rows on usual inputs beside the reference's."""
        found = Tally()
        for name in (GIVEN, NOISE):
            found.add(self.kinds[name].rows if name in self.kinds else Tally())
        return found

    @property
    def rows_far(self) -> Tally:
        """Chosen rows on given inputs, or else on noise, beside the original's."""
        usual = [self.kinds[name].rows_total for name in (GIVEN, NOISE) if name in self.kinds]
        return usual[0] if usual else Tally()

    def ask(
        self, session: Session, model: Artifact, questions: Questions, ctx: Context, *, adapters: bool = False
    ) -> None:
        """Run every question through the artifact and its references; ``adapters``: keep what `adapt` compares with."""
        self._ask_usual(session, model, questions, ctx, adapters)
        if self.large or self.program.record.decoder is not None:
            return
        saturation = Saturation(self.program) if self.static else None
        if NOISE in self.kinds and not self.by_hand:
            self._condition_noise(questions.drawn[:FEW])
        for done, (name, batch) in enumerate(questions.probes.items()):
            ctx.progress(done, len(questions.probes), f"comparing on {name}")
            self._ask_probe(session, model, name, batch, saturation, far=name in questions.far)
        if questions.states:
            ctx.progress(0, STEPS, "comparing with states fed back")
            self._feed_back(session, model, questions)

    def _ask_usual(self, session: Session, model: Artifact, questions: Questions, ctx: Context, adapters: bool) -> None:
        within = WITHIN.get(self.arithmetic, WITHIN["dynamic"])
        usual, given = questions.usual, len(questions.given)
        self.rows.learn(self._reference(self.decided, batch) for batch in usual)
        for done, batch in enumerate(usual):
            ctx.progress(done, len(usual), "comparing")
            kind = self.kinds.setdefault(GIVEN if done < given else NOISE, Kind())
            wanted, plain = self._reference(self.decided, batch), self._reference(self.loaded, batch)
            found = session.run(fitted(model, batch))
            close = self._left_out(batch, within) if self.program.record.decoder is not None else None
            clear_wanted = clear(wanted, close)
            clear_found = clear(self.rows.beside_reference(batch, wanted, found, kind.rows), close)
            self.lowering.add(clear_wanted, clear_found, slices=False)
            kind.lowering.add(clear_wanted, clear_found, slices=not self.large)
            if done < given or not given:
                beside = self.rows.beside_original(batch, plain, found, kind.rows_total)
                self.total.add(plain, beside, slices=False)
                kind.total.add(plain, beside, slices=not self.large)
            second = session.run_on_cpu(fitted(model, batch)) if done < FEW else None
            if second is not None:
                self.engines.add(clear(second, close), clear(self.rows.beside(second, found), close), slices=False)
            if adapters and done < FEW:
                self._plain.append((batch, wanted, found))

    def _condition_noise(self, batches: Sequence[Batch]) -> None:
        """How far the original moves by itself on noise: what was drawn is not what an app gives."""
        kind = self.kinds[NOISE]
        kind.own, kind.own_total = Comparison(), Comparison()
        for batch in batches:
            plain = self.loaded.run(batch)
            answers, kind.peak = self.moved.run(batch, self.unit)
            self._add_own(kind, plain, answers, self._moved_total(batch))

    def condition_again(self, questions: Questions, short: Collection[str]) -> bool:
        """Move the original some more times on kinds of inputs where the artifact fell ``short``.

        Returns:
            Whether there was such a kind: limits that depend on it may be others now.
        """
        kinds = {name: self.kinds[name] for name in (NOISE, *questions.probes) if name in short and name in self.kinds}
        kinds = {name: kind for name, kind in kinds.items() if kind.own is not None and not kind.refused}
        if self.by_hand or not kinds:
            return False
        for name, kind in kinds.items():
            batches = questions.drawn[:FEW] if name == NOISE else [questions.probes[name]]
            for batch in batches:
                plain = self.loaded.run(batch)
                for seed in range(1, MORE_DRAWS + 1):
                    own = self.moved.run(batch, self.unit, seed=seed)[0]
                    self._add_own(kind, plain, own, self._moved_total(batch, seed, far=name in questions.far))
        return True

    def _moved_total(self, batch: Batch, seed: int = 0, *, far: bool = False) -> dict[str, npt.NDArray[Any]]:
        """The original with its weights and values rounded as the artifact's are. Shapes are the signature's.

        Args:
            far: the inputs are far from what networks are fed with. There the question is what weights of 8 bits lose
                however they are rounded; near by, what they lose is the artifact's own.
        """
        weights: WeightMoves = "step" if far and self.narrow else "share"
        return self.moved.run(batch, self.weights_unit, weights=weights, seed=seed)[0]

    @staticmethod
    def _reference(reference: Reference, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """The reference's answers to one batch, in the signature's shapes."""
        try:
            return reference.run(batch)
        except (RuntimeError, IndexError) as error:
            raise SourceError(
                f"the model does not run on inputs drawn for it: {' '.join(str(error).split())[:200]}",
                fix="give inputs that it runs on with --calibration DATA",
            ) from error

    def _ask_probe(
        self,
        session: Session,
        model: Artifact,
        name: str,
        batch: Batch,
        saturation: Saturation | None,
        *,
        far: bool,
    ) -> None:
        try:
            wanted, plain = self.decided.run(batch), self.loaded.run(batch)
            own, peak = self.moved.run(batch, self.unit)
        except (RuntimeError, IndexError) as error:
            self.not_asked[name] = " ".join(str(error).split())[:100]
            return
        kind = Kind(own=Comparison(), own_total=Comparison(), peak=peak)
        self.kinds[name] = kind
        own_total = self._moved_total(batch, far=far)
        kind.beyond = "" if saturation is None else saturation.beyond(batch)
        try:
            found = session.run(fitted(model, batch))
        except Exception as error:  # the engines raise errors of many types; the verdict says which
            kind.refused = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        self._add(kind, batch, plain, wanted, found, own, own_total)

    def _feed_back(self, session: Session, model: Artifact, questions: Questions) -> None:
        """A sequence: each has states of its own, which begin as zeros."""
        import numpy as np

        kind = self.kinds[FED_BACK] = Kind(own=Comparison(), own_total=Comparison())
        states = set(questions.states.values())
        specs = {spec.name: spec for spec in self.program.signature.inputs}
        zeros = {name: np.zeros(specs[name].shape, specs[name].numpy_dtype) for name in states}
        usual = questions.usual
        sides: dict[str, dict[str, npt.NDArray[Any]]] = {
            side: dict(zeros) for side in ("plain", "wanted", "found", "own", "own_total")
        }
        for step in range(STEPS):
            fresh = {name: value for name, value in usual[step % len(usual)].items() if name not in states}
            asked = {side: {**fresh, **state} for side, state in sides.items()}
            answers = {
                "plain": self.loaded.run(asked["plain"]),
                "wanted": self.decided.run(asked["wanted"]),
                "own": self.moved.run(asked["own"], self.unit)[0],
                "own_total": self._moved_total(asked["own_total"]),
                "found": session.run(fitted(model, asked["found"])),
            }
            self._add(kind, asked["wanted"], **answers)
            for side, answer in answers.items():
                sides[side] = {
                    given: as_numpy(answer[made], specs[given].numpy_dtype) for made, given in questions.states.items()
                }

    def _add(self, kind: Kind, batch: Batch, plain: Any, wanted: Any, found: Any, own: Any, own_total: Any) -> None:
        kind.lowering.add(wanted, self.rows.beside_reference(batch, wanted, found, kind.rows))
        kind.total.add(plain, self.rows.beside_original(batch, plain, found, kind.rows_total))
        self._add_own(kind, plain, own, own_total)

    def _add_own(self, kind: Kind, plain: Any, own: Any, own_total: Any) -> None:
        if kind.own is not None and kind.own_total is not None:
            kind.own.add(plain, self.rows.beside(plain, own))
            kind.own_total.add(plain, self.rows.beside(plain, own_total))

    def adapt(self, session: Session, model: Artifact, beside: Mapping[str, Any]) -> None:
        """Compare the artifact with each adapter that ships beside it with the base and its product added."""
        from edgeship.program.adapted import adapted

        within = WITHIN.get(self.arithmetic, WITHIN["dynamic"])
        for name, matrices in beside.items():
            changed = Reference(adapted(self.program, matrices))
            session.adapt(name)
            self.adapters[name], unmoved, change = Comparison(), Comparison(), Comparison()
            for batch, wanted, found in self._plain:
                trained, close = changed.run(batch), changed.undecided(batch, within)
                answered = session.run(fitted(model, batch))
                aim = clear(trained, close)
                self.adapters[name].add(aim, clear(answered, close), slices=False)
                unmoved.add(aim, clear(found, close), slices=False)
                change.add(aim, clear(wanted, close), slices=False)
            # One that the engine ignored is no nearer than the base; one that was never trained adds nothing.
            if change.max_error > 0 and not self.adapters[name].snr_db > unmoved.snr_db:
                self.idle.append(name)

    def _left_out(self, batch: Batch, within: float) -> npt.NDArray[Any]:
        """Positions of a text that are chosen by a hair, counted; none when that is most of it. [positions]."""
        close = self.decided.undecided(batch, within)
        self.positions += close.size
        if close.mean() > MOST_LEFT_OUT:
            self.crowded += int(close.sum())
            close[:] = False
        self.close += int(close.sum())
        return close


def clear(answers: Any, close: npt.NDArray[Any] | None) -> Any:
    """The answers ``[1, T, vocabulary]``, nothing in place of the positions that are chosen by a hair."""
    if close is None or not close.any():
        return answers
    return {name: value * ~close[None, :, None] for name, value in answers.items()}


def fitted(model: Artifact, batch: Batch) -> dict[str, npt.NDArray[Any]]:
    """A batch in the dtypes that the artifact takes. Shapes are the signature's."""
    return {spec.name: as_numpy(batch[spec.name], spec.numpy_dtype) for spec in model.signature.inputs}
