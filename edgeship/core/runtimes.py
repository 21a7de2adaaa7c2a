"""What a runtime and a device are, to the rest of edgeship."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from edgeship.core.decoder import CacheType
from edgeship.core.model import Artifact
from edgeship.errors import EncodingError, MissingToolError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp, WeightUse
    from edgeship.core.profile import Choice
    from edgeship.core.target import Target
    from edgeship.core.weights import ActivationEncoding, EncodedTensor, Encoding

Arrays = Mapping[str, "npt.NDArray[Any]"]
Execution = Literal["native", "emulated"]
# Distributions whose versions decide what an engine answers.
ENGINE_PACKAGES = ("onnxruntime", "coremltools", "coreai-core", "ai-edge-litert", "onnxruntime-qnn")
ActivationMode = Literal["float", "int8", "int16", "dynamic"]


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


class Runtime(ABC):
    """An engine on this machine that runs one kind of artifact, and reads its weights back.

    Class attributes:
        name: as in ``--runtime``. title: for people. artifact: the class of models it opens.
        packages: distributions it needs, in the order to look. extra: the pip extra that brings them.
        execution: ``native`` when a run here is the real engine, ``emulated`` when it is an emulator or evaluator.
        timed: whether a latency taken here means anything; else `untimed_reason` says why not.
        eval_samples: how many samples an evaluation takes at most, fewer where a run here is slow.
        overhead_bytes: what the engine itself takes in an app, for the size check; not fitted to devices yet.
        unseen: activations where a profile wants static 8-bit ones, and no data say what inputs look like.
        unbounded: activations where a profile wants 16-bit ones, and neither data nor the model say what range inputs
            have; with ``float`` weights are float16 too.
        computes: activations other than float ones that it can compute with.
        clips_inside: whether an integer layer clips its result at no cost.
        centred_int16: whether its 16-bit activations have zero point 0.
        float_products: whether an operator with integer weights can compute in float beside static activations.
        language_of: of an engine for language models: the runtime whose format, targets and profiles it shares.
        caches: how such an engine can keep keys and values, its default first.
        cache_copies: how often keys and values are in memory: twice where a step writes others than it reads.
        adapters: whether it loads LoRA adapters beside a model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    artifact: ClassVar[type[Artifact]]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    execution: ClassVar[Execution] = "native"
    timed: ClassVar[bool] = False
    untimed_reason: ClassVar[str] = ""
    eval_samples: ClassVar[int] = 2000
    overhead_bytes: ClassVar[int] = 30_000_000
    unseen: ClassVar[ActivationMode] = "float"
    unbounded: ClassVar[ActivationMode] = "int16"
    computes: ClassVar[tuple[ActivationMode, ...]] = ("int8",)
    clips_inside: ClassVar[bool] = True
    centred_int16: ClassVar[bool] = False
    float_products: ClassVar[bool] = True
    language_of: ClassVar[str] = ""
    adapters: ClassVar[bool] = False
    caches: ClassVar[tuple[CacheType, ...]] = ("float32",)
    cache_copies: ClassVar[int] = 1

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

    @abstractmethod
    def holds(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """Empty when a weight of ``op`` can be stored so, exactly and safely; else the reason why not."""

    def cache_of(self, asked: CacheType | None, choice: Choice) -> CacheType:
        """How a language model's keys and values are kept: as asked for, else as the engine does.

        Raises `UsageError` when the engine cannot keep them so.
        """
        if asked is not None and asked not in self.caches:
            able = " or ".join(self.caches)
            raise UsageError(
                f"{self.title} keeps keys and values in {able}, not in {asked}",
                fix=f"--kv-cache {able}, or leave {self.name} out with --runtime",
            )
        return asked or self.caches[0]

    def refused_by_system(self, encoding: Encoding, target: Target, options: Mapping[str, Mapping[str, str]]) -> str:
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
        return encoding.bits

    def scale_bits(self, encoding: Encoding) -> int:
        """Bits a scale takes in the file."""
        return 16

    def stored_bits(self, use: WeightUse, encoding: Encoding, sparsity: float = 0.0) -> int:
        """Bits that a weight takes in the file with scales, tables and mask; ``sparsity`` is its share of zeros."""
        from edgeship.core.encodings import stored_bits

        return stored_bits(encoding, use, self.container_bits(use.op, encoding), sparsity, self.scale_bits(encoding))

    def resident_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits a weight takes in memory while the model runs: more than stored where the engine decompresses it."""
        return self.container_bits(op, encoding)

    def working_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits a weight takes beside `resident_bits`: pages of a mapped file, and copies that are made for a run."""
        return 0

    def table_bits(self, encoding: Encoding, activations: ActivationMode) -> int:
        """Bits more that a layer's weight takes because its rows are looked up too: tables of tokens tied to a head."""
        return 0

    def unpacks(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> bool:
        """Whether a weight is unpacked again at every run, which takes longer than computing in float32."""
        return False

    def versions(self) -> dict[str, str]:
        """Installed versions of the packages it needs. Raises `MissingToolError` naming the first that is absent."""
        found = {}
        for package in self.packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                raise MissingToolError(
                    f"{self.title} needs {package}", fix=f'pip install "edgeship[{self.extra}]"'
                ) from None
        return found

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
