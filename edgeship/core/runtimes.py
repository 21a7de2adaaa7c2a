"""What a runtime is, to the rest of edgeship: a format (the file) and an engine (what runs it) with what both can do.

Whatever depends on a runtime is asked of it here. Nothing else in edgeship asks for a runtime by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from edgeship.core.decoder import CacheType
from edgeship.core.forms import ActivationMode, Forms
from edgeship.core.installed import is_installed, not_offered
from edgeship.core.model import Artifact
from edgeship.errors import EncodingError, MissingToolError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.choice import Choice
    from edgeship.core.inventory import WeightOp, WeightUse
    from edgeship.core.target import Target
    from edgeship.core.weights import ActivationEncoding, EncodedTensor, Encoding

__all__ = [
    "ActivationMode", "Arrays", "Availability", "Engine", "Execution", "Format", "Forms", "Roofline", "Runtime",
    "Session", "as_numpy",
]  # fmt: skip

Arrays = Mapping[str, "npt.NDArray[Any]"]
Execution = Literal["native", "emulated"]


class Session(ABC):
    """An artifact opened from disk, ready to run. Use it as a context manager."""

    @abstractmethod
    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once. Inputs and outputs by the signature's names, in the artifact's own shapes and dtypes."""

    def run_on_cpu(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]] | None:
        """The same artifact by a second engine, for emulators whose operators can be silently wrong; None where
        there is no second engine."""
        return None

    def adapt(self, name: str) -> None:
        """Answer with an adapter that ships with the model, from the next text on; without one when ``name`` is empty.

        Raises `UsageError` when there is none of that name, or the engine takes none.
        """
        if name:
            raise UsageError(f"this engine has no adapter {name!r}", fix="merge it into the model with --lora")

    def close(self) -> None:  # noqa: B027  most sessions hold nothing
        """Free what the session holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Format:
    """The file: what a target decodes, a profile names and several engines may share.

    Args:
        name: as targets and profiles spell it. title: for people.
        packages: distributions that write and read it, in the order to look.
        float_bits: of a number that nothing encodes: 16 where programs compute in float16, else 32.
        forms: which encodings it stores and how, a row a family; what has no row is refused.
    """

    name: str
    title: str
    packages: tuple[str, ...] = ()
    float_bits: Literal[16, 32] = 32
    forms: Forms = field(default_factory=Forms)


@dataclass(frozen=True)
class Roofline:
    """How an engine uses a device, for an estimate of its speed there.

    Args:
        unit: what it computes on, as in the target's ``peak_ops_s``.
        efficiency: share of the peak rate that a large convolution or matrix product reaches.
        run_seconds: time of an empty run: dispatch, synchronisation, input and output.
        int16: the dtype of the target whose rate 16-bit activations run at.
    """

    unit: Literal["npu", "gpu", "cpu"]
    efficiency: float
    run_seconds: float
    int16: str = "f32"


@dataclass(frozen=True)
class Engine:
    """What runs a format: the figures of it that a plan, a check or an estimate needs.

    Args:
        runs: networks, or language models with their caches.
        packages: distributions beside the format's that it needs, looked for first.
        extra: edgeship's pip extra that brings them all; empty when none does.
        execution: ``native`` when a run here is the real engine, ``emulated`` when it is an emulator or evaluator.
        untimed: why a latency taken here means nothing; empty when it means something.
        eval_samples: how many samples an evaluation takes at most, fewer where a run here is slow.
        overhead_bytes: what the engine itself takes in an app, for the size check; not fitted to devices yet.
        roofline: what an estimate needs; None when nothing is known.
        unseen: activations where a profile wants static 8-bit ones, and no data say what inputs look like.
        unbounded: activations where a profile wants 16-bit ones, and neither data nor the model say what range inputs
            have; with ``float`` weights are float16 too.
        computes: activations other than float ones that it can compute with.
        clips_inside: whether an integer layer clips its result at no cost.
        centred_int16: whether its 16-bit activations have zero point 0.
        float_products: whether an operator with integer weights can compute in float beside static activations.
        caches: how an engine for language models can keep keys and values, its default first.
        cache_copies: how often keys and values are in memory: twice where a step writes others than it reads.
        adapters: whether it loads LoRA adapters beside a model.
    """

    runs: Literal["networks", "language models"] = "networks"
    packages: tuple[str, ...] = ()
    extra: str = ""
    execution: Execution = "native"
    untimed: str = ""
    eval_samples: int = 2000
    overhead_bytes: int = 30_000_000
    roofline: Roofline | None = None
    unseen: ActivationMode = "float"
    unbounded: ActivationMode = "int16"
    computes: tuple[ActivationMode, ...] = ("int8",)
    clips_inside: bool = True
    centred_int16: bool = False
    float_products: bool = True
    caches: tuple[CacheType, ...] = ("float32",)
    cache_copies: int = 1
    adapters: bool = False

    @property
    def for_language(self) -> bool:
        """Whether it runs language models."""
        return self.runs == "language models"

    def of_texts(
        self,
        eval_samples: int,
        computes: tuple[ActivationMode, ...] = (),
        caches: tuple[CacheType, ...] = ("float32",),
    ) -> Engine:
        """The engine of the same packages, on the same devices, for language models."""
        return Engine(
            "language models",
            packages=self.packages,
            extra=self.extra,
            execution=self.execution,
            untimed=self.untimed,
            eval_samples=eval_samples,
            roofline=self.roofline,
            computes=computes,
            caches=caches,
        )


class Runtime(ABC):
    """An engine on this machine that runs one kind of artifact, and reads its weights back.

    Class attributes:
        name: as in ``--runtime``. title: for people. artifact: the class of models it opens.
        format: the file. engine: what runs it.
        through: other kinds of artifact that its own is lowered from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    artifact: ClassVar[type[Artifact]]
    format: ClassVar[Format]
    engine: ClassVar[Engine]
    through: ClassVar[tuple[type[Artifact], ...]] = ()

    @abstractmethod
    def open(self, artifact: Artifact) -> Session:
        """Load an artifact from disk. Raises `ArtifactError` when it is damaged."""

    def open_fast(self, artifact: Artifact) -> Session:
        """As an app would open it: every fast kernel allowed. Timing uses this; `open` is for comparing numbers."""
        return self.open(artifact)

    def warm_imports(self) -> None:  # noqa: B027  most engines import nothing worth separating
        """Import the engine, so that memory taken before and after opening a model can be told apart."""

    @abstractmethod
    def read_weights(self, artifact: Artifact) -> Mapping[str, EncodedTensor]:
        """Every placed weight as the saved file holds it, by torch name, in the torch weight's layout.

        Reads the file with the format's own reader and undoes `Placement` permutations and reshapes, so that the
        result compares bit for bit with what compression decided.
        """

    @property
    def forms(self) -> Forms:
        """Which encodings it stores and how: the format's table, unless this engine wants another."""
        return self.format.forms

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Why no weight of ``op`` is taken beside such activations, whatever its encoding; empty when some are."""
        return ""

    def holds(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """Empty when a weight of ``op`` can be stored so, exactly and safely; else the reason why not."""
        return self.refuses(op, activations) or self.forms.refusal(op, encoding, activations)

    def cache_of(self, asked: CacheType | None, choice: Choice) -> CacheType:
        """How a language model's keys and values are kept: as asked for, else as the engine does.

        Raises `UsageError` when the engine cannot keep them so.
        """
        if asked is not None and asked not in self.engine.caches:
            able = " or ".join(self.engine.caches)
            raise UsageError(
                f"{self.title} keeps keys and values in {able}, not in {asked}",
                fix=f"--kv-cache {able}, or leave {self.name} out with --runtime",
            )
        return asked or self.engine.caches[0]

    def refused_by_system(self, encoding: Encoding, target: Target, options: Mapping[str, Mapping[str, Any]]) -> str:
        """Empty when the oldest system that is built for has the encoding too; else what it has instead.

        Args:
            options: ``--set`` values by pass name and field: they can ask for another system.
        """
        return ""

    def read_activations(self, artifact: Artifact) -> dict[str, ActivationEncoding] | None:
        """Static grids as the saved file holds them, by graph node; None where that cannot be read back."""
        return None

    def read_adapters(
        self, artifact: Artifact
    ) -> Mapping[str, Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
        """LoRA matrices beside a model as their files hold them: adapter -> layer -> ``[in, r]`` and ``[r, out]``."""
        return {}

    def container_bits(self, op: WeightOp, encoding: Encoding) -> int:
        """Bits a weight takes in the file: more than decided where the format lacks that width (int3 in int4)."""
        return self.forms.container_bits(op, encoding)

    def float_bits(self, choice: Choice) -> Literal[16, 32]:
        """Bits of a number that nothing encodes, a weight or an activation: float32 where the weights are to be so."""
        return 32 if choice.weights == "float32" else self.format.float_bits

    def activation_bits(self, activations: ActivationMode, float_bits: int) -> int:
        """Bits of an activation in memory, where one that stays float has ``float_bits``."""
        return {"int8": 8, "int16": 16}.get(activations, float_bits)

    def stored_bits(self, use: WeightUse, encoding: Encoding, sparsity: float = 0.0) -> int:
        """Bits that a weight takes in the file with scales, tables and mask; ``sparsity`` is its share of zeros."""
        stored = self.forms.in_the_file(encoding)
        container = self.container_bits(use.op, encoding)
        return stored.stored_bits(use, container, sparsity, self.forms.scale_bits(encoding))

    def resident_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits a weight takes in memory while the model runs: more than stored where the engine decompresses it."""
        return self.forms.resident_bits(op, encoding, activations)

    def working_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits a weight takes beside `resident_bits`: pages of a mapped file, and copies that are made for a run."""
        return 0

    def table_bits(self, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits more that a layer's weight takes because its rows are looked up too: tables of tokens tied to a head."""
        return 0

    def unpacks(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> bool:
        """Whether a weight is unpacked again at every run, which takes longer than computing in float32."""
        return self.forms.unpacks(op, encoding, activations)

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that it needs, the engine's before the format's."""
        return tuple(dict.fromkeys((*self.engine.packages, *self.format.packages)))

    def opens(self, kind: type[Artifact]) -> bool:
        """Whether it opens artifacts of a kind, or its own are lowered from them."""
        return kind is self.artifact or kind in self.through

    def runs_on(self, target: Target) -> bool:
        """Whether it runs on a device: the target names it, or its format."""
        return not {self.name, self.format.name}.isdisjoint(target.runtime_names)

    def versions(self) -> dict[str, str]:
        """Installed versions of the packages it needs. Raises `MissingToolError` naming the first that is absent."""
        found = {}
        for package in self.packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                reason = not_offered(package)
                if reason:
                    raise MissingToolError(
                        f"{self.title} does not work here: {reason}", fix="name other runtimes with --runtime"
                    ) from None
                wanted = f'"edgeship[{self.engine.extra}]"' if self.engine.extra else package
                raise MissingToolError(f"{self.title} needs {package}", fix=f"pip install {wanted}") from None
        return found

    def unpublished(self) -> str:
        """Why this system can never have what the runtime needs; empty when it is there or can be installed."""
        reasons = filter(None, map(not_offered, self.packages))
        return next(reasons, "") if not all(map(is_installed, self.packages)) else ""

    def require(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> None:
        """Raise `EncodingError` with the reason unless `holds`."""
        reason = self.holds(op, encoding, activations)
        if reason:
            raise EncodingError(f"{self.title} cannot hold {encoding} for {op}: {reason}")


@dataclass(frozen=True)
class Availability:
    """Whether a plug-in works here, for ``doctor`` and ``runtimes``."""

    name: str
    title: str
    ok: bool
    detail: str
    fix: str = ""


def as_numpy(value: Any, dtype: str) -> npt.NDArray[np.generic]:
    """An array in ``dtype``, refusing to change integers that do not fit."""
    import numpy as np

    array = np.asarray(value)
    wanted = np.dtype(dtype)
    if array.dtype == wanted:
        return array
    converted = array.astype(wanted)
    if (
        np.issubdtype(wanted, np.integer)
        and np.issubdtype(array.dtype, np.integer)
        and not np.array_equal(converted, array)
    ):
        raise EncodingError(f"values do not fit {dtype}", fix="keep token ids below 2**31")
    return converted
