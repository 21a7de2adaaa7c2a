"""compress/quantize: decide how each weight is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted, without_zeros
from edgeship.core.encodings.words import FLOATS, Form, Words
from edgeship.core.inventory import WeightOp
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import (
    CALIBRATION_TOKENS,
    Candidates,
    Method,
    calibration_tokens,
    held_as_given,
    next_wider,
    planned_words,
    rounding_method,
    sparse_ops,
    wide_method,
    wider_candidates,
)
from edgeship.core.profile import DataRef, Request
from edgeship.core.units import counted, human_bytes
from edgeship.core.weights import Affine, AffineTensor, Dense, EncodedTensor, Encoding, Float, Granularity
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgeship.compression.sensitive import Sensitive
    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram

# The ratio in dB that outputs should keep of what rounding weights costs, by activations, and for fewer than 8 bits.
# Static 8-bit activations cost more themselves.
FLOOR_DB = {"float": 30.0, "int8": 18.0, "short": 15.0}
# Weights are measured rounded to nearest; GPTQ loses less (EfficientNet-Lite0 in 8 bits: 16.5 dB and 33.2).
GPTQ_GAIN_DB = 15.0
# Names in a sentence of the report.
SHOWN = 5
# Seconds of calibration that a network's build says beforehand.
WORTH_SAYING = 10.0
# More inputs than any file of text holds windows.
EVERYTHING = 1 << 40
# Options that say more of integers and palettes than their form.
GRID_WORDS = ("bits", "granularity", "group_size", "group_channels", "symmetric")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Decide how each weight is stored: in half precision, integers with scales, or indices into a palette.

    Args:
        form: ``float16``; ``int``, an affine grid of ``bits``; ``palette``, a table of ``2**bits`` values; ``auto``,
            what compress/allocate chose for each layer.
        granularity, group_size: how far one scale reaches. A weight whose input channels the group does not divide,
            and a convolution, gets one scale a channel.
        group_channels: output channels that share a palette; one for the tensor when None.
        symmetric: zero point 0 and the narrow range.
        encoding: short name of an encoding (``int4-g32``, ``mxfp4``) in place of form, bits, granularity, group_size,
            group_channels and symmetric.
        embeddings: short name of the encoding of tables of which rows are looked up; as the others when empty.
        method: ``nearest`` covers each block's range; ``clipped`` shrinks it to the least squared error; ``gptq``
            rounds linear layers and convolutions column by column against calibration data; ``awq`` clips by the error
            on calibration data, after compress/smooth has scaled the channels that matter.
        bias_correction: give biases back what rounding took from the mean of each output channel.
        npu_block: group scales that Hexagon holds: a small integer times one scale a channel.
        data, samples: calibration inputs, at most so many.
        tokens: of a language model's text, in place of ``samples``: 32768 by default, spread over the whole of it.
        minutes: time for calibration: fewer inputs are taken when a forecast says that all of them take longer.
        floor_db: what the outputs should keep: weights that make most of what is lost beyond it get more bits, within
            a twelfth of the bytes, measured on a few inputs. 0 looks for none.
        raised: weights to which the accuracy gate gave another encoding. kept: those that the user gave one.
        wider: (operator, short names) of what such weights may get.
        sparse: operators whose pruned weights the runtime stores without their zeros.
        given: weights that the source stores as integers and the runtime holds so: they stay as they are. Others that
            it stores so stay floats of the same value.
        half_scales: their scales go to the float16 grid, which is what the runtime computes with.
    """

    name: ClassVar[str] = "compress/quantize"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "weights"
    decided: ClassVar[dict[str, str]] = {"kept": "--keep", "wider": "--runtime"}
    after: ClassVar[tuple[str, ...]] = ("compress/allocate", "compress/finetune", "compress/prune", "compress/smooth")

    form: Form = "int"
    bits: int = 8
    granularity: Granularity = "channel"
    group_size: int | None = None
    group_channels: int | None = None
    symmetric: bool = True
    encoding: str = ""
    embeddings: str = ""
    method: Method = "nearest"
    bias_correction: bool = False
    npu_block: bool = False
    data: DataRef | None = None
    samples: int = 128
    tokens: int | None = None
    minutes: float | None = None
    floor_db: float = 0.0
    raised: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    wider: Candidates = ()
    sparse: tuple[WeightOp, ...] = ()
    given: tuple[str, ...] = ()
    half_scales: bool = False

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured from the profile. Rounding to nearest loses what calibration data can save."""
        from edgeship.core.registry import runtimes

        choice = request.choice
        if choice.weights == "float32":
            return Skip(f"profile {request.profile.name} keeps weights in float32")
        common = cls(
            embeddings=choice.embeddings,
            method=rounding_method(request),
            data=request.calibration,
            tokens=calibration_tokens(request),
            raised=request.raised,
            kept=request.keep,
            sparse=sparse_ops(request),
            given=held_as_given(request),
            half_scales=runtimes()[request.runtime].format.float_bits == 16 and bool(held_as_given(request)),
        )
        if choice.weights == "auto":
            return replace(common, form="auto", bits=0)
        asked = request.options.get(cls.name, {})
        words = planned_words(request)
        # What the user names is in place of the profile's word.
        encoding = encoding_named(asked.get("encoding") or choice.weights)
        common = replace(common, **_guard(request, encoding), **dataclasses.asdict(words))
        if words.form in FLOATS:
            return replace(common, method="nearest", data=None, tokens=None)
        if not isinstance(words.meant(), Dense):
            # Nothing rounds to it against data.
            method: Method = "nearest" if rounding_method(request) == "nearest" else "clipped"
            return replace(common, method=method, data=None, tokens=None)
        wide = isinstance(encoding, Affine) and isinstance(words.meant(), Affine) and words.bits == 8
        return replace(common, method=wide_method(request)) if wide else common

    def confirm(self, request: Request) -> None:
        """Refuse what the runtime cannot hold, and a method without its data."""
        from edgeship.core.planning import refuse_unholdable

        if self.embeddings:
            encoding_named(self.embeddings)
        if self.samples < 1:
            raise UsageError(f"{self.name}.samples must be at least 1", fix="leave it out for 128")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(
                f"{self.name}.tokens={self.tokens} is too few", fix=f"leave it out for {CALIBRATION_TOKENS}"
            )
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(
                f"{self.name}.minutes={self.minutes:g} is not a time", fix="give more than 0, or leave it out"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(
                f"{self.name}.group_size={self.group_size} is not a group size", fix="give 16, 32, 64 or 128"
            )
        if (self.method in ("gptq", "awq") or self.bias_correction) and request.calibration is None:
            what = "bias correction" if self.bias_correction else f"method {self.method}"
            raise DataError(f"{what} needs calibration data", fix="add --calibration DATA")
        if self.form != "auto" and self.method in ("gptq", "awq") and not isinstance(self.base, Dense):
            raise UsageError(
                f"{self.name}.method={self.method} does not round to {self.base}", fix="use method=clipped or nearest"
            )
        self._refuse_idle(request)
        refuse_unholdable(request, self.encoding_of)

    def _refuse_idle(self, request: Request) -> None:
        """Refuse options that this form does not look at."""
        given = request.options.get(self.name, {})
        if self.form == "auto" and request.choice.weights != "auto":
            raise UsageError(f"{self.name}.form=auto allocates nothing", fix="use --profile auto")
        what, way_out = "", ""
        if self.form == "auto":
            what, way_out = "auto chooses them", "another profile"
        elif self.encoding:
            what, way_out = f"weights are {self.encoding}", f"--set {self.name}.encoding, or the others, alone"
        elif self.form in FLOATS:
            what, way_out = f"weights are {self.form}", f"--set {self.name}.form=int"
        named = ("encoding",) if self.form == "auto" else ()
        idle = [name for name in (*named, *GRID_WORDS) if name in given]
        if self.encoding and self.form != "auto" and "form" in given:
            idle.append("form")
        if what and idle:
            raise UsageError(f"--set {self.name}.{idle[0]} has no effect: {what}", fix=f"use {way_out}")

    @property
    def base(self) -> Encoding:
        """The encoding asked for, before it is fitted to a weight."""
        words = {field.name: getattr(self, field.name) for field in dataclasses.fields(Words)}
        return Words(**words).meant()

    def encoding_of(self, use: WeightUse) -> Encoding | None:
        """How one weight is stored; None for biases, norms and scalars, which stay as they are, and for what only
        compress/allocate knows."""
        if use.op not in ENCODED_OPS or (use.given and use.name not in dict(self.kept)):
            return None
        text = dict(self.kept).get(use.name) or dict(self.raised).get(use.name)
        text = text or (self.embeddings if use.looked_up or use.op == "embedding" else "")
        if not text and self.form == "auto":
            return None
        return fitted(encoding_named(text) if text else self.base, use)

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Encode every weight of a linear, convolution or embedding."""
        from edgeship.compression.encode import Encoder
        from edgeship.program.program import TorchProgram
        from edgeship.program.stored import ENCODED, EncodedStore, Overlay

        program = TorchProgram.open(model)
        wanted = self._wanted(program)
        found = self._sensitive(program, wanted, ctx)
        wanted |= found.kept
        needs_data = self.method in ("gptq", "awq") or self.bias_correction
        batches: list[dict[str, Any]] = []
        notes: list[str] = []
        told = ctx.progress
        if needs_data and any(not isinstance(encoding, Float) for encoding in wanted.values()):
            if self.data is None:
                raise DataError(f"method {self.method} needs calibration data", fix="add --calibration DATA")
            batches, note, told = self._budgeted(program, wanted, ctx)
            notes += [note] if note else []
        encoder = Encoder(program, wanted, self.method, self.npu_block, self.bias_correction, told, ctx.folder)
        folder = ctx.folder / "program"
        folder.mkdir()
        taken = self._taken(program)
        store = EncodedStore.create(folder / ENCODED, len(wanted) + len(taken))
        store.update(taken)
        _, changed = encoder.encode(batches, store)
        encoded = store.close()
        words = self.form if self.form in ("auto", "float16", "float32") else str(self.base)
        words += f" ({counted(len(taken), 'weight')} as the source stores them)" if taken else ""
        record = replace(
            program.record,
            encodings=dict(encoded.encodings),
            history=(
                *program.record.history,
                f"{self.name}: {words}, {self.method}",
                *notes,
                *_told(found, self._kept_as(wanted)),
            ),
            losses=found.losses,
        )
        weights = Overlay(program.weights, changed) if changed else program.weights
        replace(program, encoded=encoded, record=record, weights=weights).save(folder)
        return TorchModel(folder, model.signature)

    def _kept_as(self, wanted: dict[str, Encoding]) -> tuple[tuple[str, str], ...]:
        """Each kept weight with the encoding that it has; where its shape allows another only, with both."""
        from edgeship.core.encodings import short_name

        told = []
        for name, text in self.kept:
            other = name in wanted and wanted[name].dense != encoding_named(text).dense
            told.append((name, f"{short_name(wanted[name])} ({text} does not fit)" if other else text))
        return tuple(told)

    def _sensitive(self, program: TorchProgram, wanted: dict[str, Encoding], ctx: Context) -> Sensitive:
        """Weights that cost the outputs too much in few bits; none of those that something else decided."""
        from edgeship.compression.sensitive import SAMPLES, Sensitive, find_sensitive
        from edgeship.data.batches import calibration_batches
        from edgeship.data.probes import probe_batches
        from edgeship.data.tones import tones

        decided = {*dict(self.kept), *dict(self.raised), *program.record.pruned}
        free = {
            name: encoding
            for name, encoding in wanted.items()
            if name not in decided and not isinstance(encoding, Float)
        }
        if self.floor_db <= 0 or not free or program.record.decoder is not None:
            return Sensitive()
        batches = calibration_batches(self.data, program.signature, SAMPLES)
        if self.data is None:
            # What is given stands for what comes; drawn noise does not: the check's probes and sounds are asked too.
            probes = [probe.batch for probe in probe_batches(program.signature)]
            few = max(2, (SAMPLES - len(probes)) // 2)
            batches = [*batches[:few], *tones(program.signature, batches[few : 2 * few]), *probes]
        return find_sensitive(
            program,
            free,
            lambda use, encoding: next_wider(self.wider, use, encoding),
            batches,
            self.floor_db,
            ctx.progress,
        )

    def _budgeted(
        self, program: TorchProgram, wanted: Mapping[str, Encoding], ctx: Context
    ) -> tuple[list[dict[str, Any]], str, Callable[[int, int, str], None]]:
        """The inputs that the budget allows, a remark on them for a language model, progress that says what is left.

        What calibrating on them takes is said before it starts.
        """
        from edgeship.compression.forecast import Progress, forecast, human_seconds
        from edgeship.data.batches import calibration_batches
        from edgeship.program.program import REMARK

        assert self.data is not None
        window = program.signature.inputs[0].shape[-1] if program.record.decoder is not None else 0
        by_tokens = bool(window) and (self.tokens is not None or self.minutes is not None)
        given = calibration_batches(self.data, program.signature, EVERYTHING if by_tokens else self.samples)
        count = len(given)
        if by_tokens and self.tokens is not None:
            count = min(count, max(1, self.tokens // window))
        ahead = forecast(program, given, wanted, self.method)
        if self.minutes is not None:
            allowed = ahead.batches_within(60 * self.minutes)
            if allowed == 0:
                ctx.log(f"{self.name}: {self.minutes:g} min are less than rounding alone takes; one input is read")
            count = min(count, max(1, allowed))
        taken = [given[index * len(given) // count] for index in range(count)]
        what = f"{count * window} of {len(given) * window} tokens given" if window else f"{count} inputs"
        told = Progress(ahead, count, ctx.progress)
        memory = human_bytes(ahead.memory_bytes(count))
        line = f"calibration on {what}, about {human_seconds(told.expected)} and {memory} of memory"
        ctx.log(f"{self.name}: {line}")
        if window or told.expected > WORTH_SAYING:
            ctx.say(line)
        left_out = (
            " (the others are left out: --set compress/quantize.tokens=N takes more)" if count < len(given) else ""
        )
        return taken, f"{REMARK}calibrated on {what}{left_out}" if window else "", told

    def _taken(self, program: TorchProgram) -> dict[str, EncodedTensor]:
        """Weights that keep the source's own integers."""
        found: dict[str, EncodedTensor] = {}
        for name in self.given:
            tensor = program.encoded[name]
            if self.half_scales and isinstance(tensor, AffineTensor):
                half = tensor.scale.astype("float16").astype("float32")
                if not (half.min() >= 2.0**-14 and half.max() < 65504):
                    continue
                tensor = replace(tensor, scale=half)
            found[name] = tensor
        return found

    def _wanted(self, program: TorchProgram) -> dict[str, Encoding]:
        """The final encoding of every weight that gets one: allocated, raised, and sparse where zeros pay."""
        record, raised, kept = program.record, dict(self.raised), dict(self.kept)
        wanted: dict[str, Encoding] = {}
        for use in record.inventory.weights:
            encoding = self.encoding_of(use)
            if self.form == "auto" and use.name not in raised and use.name not in kept:
                encoding = record.assignment.get(use.name)
            if encoding is None or use.name in record.aliases or use.name in self.given:
                continue
            if use.name in record.pruned and use.op in self.sparse:
                encoding = without_zeros(encoding, use, record.pruned[use.name])
            wanted[use.name] = encoding
        return wanted


def _guard(request: Request, encoding: Encoding) -> dict[str, Any]:
    """What the outputs should keep of a network's weights in few bits, and what sensitive ones may get instead."""
    # Who says how weights are stored means it; trained ones sit where their grid has them.
    said = {"encoding", "form", "bits", "granularity", "group_size"}.intersection(
        request.options.get("compress/quantize", {})
    )
    trained = "compress/finetune" in request.options
    if isinstance(encoding, Float) or request.decoder is not None or trained or said or request.weights:
        return {}
    floor = FLOOR_DB["short"] if encoding.bits < 8 else FLOOR_DB.get(request.choice.activations, FLOOR_DB["float"])
    if encoding.bits == 8 and wide_method(request) == "gptq":
        floor -= GPTQ_GAIN_DB
    return {"floor_db": floor, "wider": wider_candidates(request)}


def _told(found: Sensitive, kept: tuple[tuple[str, str], ...]) -> list[str]:
    """Sentences for the report about exceptions."""
    from edgeship.core.encodings import short_name
    from edgeship.program.program import REMARK

    told = []
    if found.kept:
        names = [f"{name} {short_name(encoding)}" for name, encoding in found.kept.items()]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        verbs = "costs the outputs most in few bits, and has more"
        if len(names) > 1:
            verbs = "cost the outputs most in few bits, and have more"
        told.append(f"{counted(len(names), 'weight')} {verbs}: {', '.join(names[:SHOWN])}{more}")
    if kept:
        told.append(f"kept as --keep says: {', '.join(f'{name} {text}' for name, text in kept[:SHOWN])}")
    return [f"{REMARK}compress/quantize: {sentence}" for sentence in told]
