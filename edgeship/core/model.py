"""Model handles: what flows through the converter graph. A handle's class is its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar

from edgeship.core.decoder import LanguageFacts
from edgeship.core.names import quoted
from edgeship.errors import ArtifactError

T = TypeVar("T")

Dtype = Literal["f32", "f16", "i64", "i32", "i16", "i8", "u16", "u8", "bool"]
NUMPY_DTYPES: dict[str, str] = {
    "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "i16": "int16",
    "i8": "int8", "u16": "uint16", "u8": "uint8", "bool": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Args:
        shape: static sizes. layout: axis letters such as ``NCHW`` or ``NT``, when known.
        low, high: inclusive range that generated inputs are drawn from (token ids, pixel values).
        mean, std: per-channel normalisation that the app must apply first: ``(pixel / 255 - mean) / std``.
        source: what the source calls it, where that is not a name that every runtime accepts (`edgeship.core.names`).
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    layout: str | None = None
    low: float | None = None
    high: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """What users may call it: its name, and the source's where that is another."""
        return (self.name,) if self.source is None else (self.name, self.source)

    def of(self, values: Mapping[str, T]) -> T | None:
        """Its value in a mapping by name, under either spelling; None where neither is there."""
        return next((values[name] for name in self.spellings if name in values), None)

    @property
    def is_float(self) -> bool:
        """Whether it holds floats, of any width."""
        return self.dtype in ("f32", "f16")

    @property
    def numpy_dtype(self) -> str:
        """The NumPy name of the dtype."""
        return NUMPY_DTYPES[self.dtype]

    def with_dtype(self, dtype: Dtype) -> Self:
        """The same tensor in another dtype."""
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        return f"{quoted(self.name)}:{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in order, by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Placement:
    """Where an artifact keeps one weight, so that it can be read back.

    Args:
        weight: the weight's name in the torch program. stored: its name (or path) in the artifact.
        permutation: axes of the weight in stored order, when it was transposed:
            ``stored = weight.transpose(permutation)``.
        shape: the stored shape after the permutation, when it was reshaped as well.
    """

    weight: str
    stored: str
    permutation: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Model:
    """A model on disk: a folder or a file, its digest over content, and its signature."""

    kind: ClassVar[str] = "model"
    path: Path
    signature: Signature
    digest: str = ""


@dataclass(frozen=True)
class Source(Model):
    """What the user named, before anything is loaded. ``form`` tells which loader takes it.

    Args:
        factory: the function that a file of weights is put into the module of; empty when there is none.
        search: where Python looked for modules when the source was named; importing one may change that.
        held: the program itself, where it lies in memory; ``digest`` is then over its graph and weights.
    """

    kind: ClassVar[str] = "Source"
    form: str = ""
    reference: str = ""
    factory: str = ""
    search: tuple[str, ...] = ()
    held: object | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class TorchModel(Model):
    """A folder: program.pt2 (graph), weights.safetensors, encoded.safetensors, program.json."""

    kind: ClassVar[str] = "TorchModel"


@dataclass(frozen=True)
class KeptFiles(Model):
    """Files beside the results of steps: a text as windows of tokens, and what was given from memory: data as an
    ``.npz``, a model of transformers as its folder."""

    kind: ClassVar[str] = "KeptFiles"


@dataclass(frozen=True)
class Artifact(Model):
    """A model in a runtime's own format, with the record of where each weight lies.

    Args:
        path: the main file (or package folder). files: everything that ships, relative to the step's folder.
        runtime: name of the runtime that opens it. compute: arithmetic that the runtime does: f32, f16, or integer.
        facts: what else a report should say (context binary sizes, op counts, versions), plain strings.
        language: of a language model: its context, its cache, and the tokens that end an answer.
    """

    runtime: ClassVar[str] = ""
    suffix: ClassVar[str] = ""
    files: tuple[str, ...] = ()
    placements: tuple[Placement, ...] = ()
    compute: Literal["f32", "f16", "int"] = "f32"
    facts: dict[str, str] = field(default_factory=dict)
    language: LanguageFacts | None = None

    def spoken(self) -> LanguageFacts:
        """`language`. Raises `ArtifactError` for an artifact that is no language model's."""
        if self.language is None:
            raise ArtifactError(f"{self.path} is not recorded as a language model", fix="build it again")
        return self.language


@dataclass(frozen=True)
class OnnxModel(Artifact):
    """An ``.onnx`` file for ONNX Runtime."""

    kind: ClassVar[str] = "OnnxModel"
    runtime: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"


@dataclass(frozen=True)
class CoreMLModel(Artifact):
    """An ``.mlpackage`` for Core ML."""

    kind: ClassVar[str] = "CoreMLModel"
    runtime: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage"


@dataclass(frozen=True)
class CoreAIModel(Artifact):
    """An ``.aimodel`` for Core AI."""

    kind: ClassVar[str] = "CoreAIModel"
    runtime: ClassVar[str] = "coreai"
    suffix: ClassVar[str] = ".aimodel"


@dataclass(frozen=True)
class TFLiteModel(Artifact):
    """A ``.tflite`` file for LiteRT."""

    kind: ClassVar[str] = "TFLiteModel"
    runtime: ClassVar[str] = "tflite"
    suffix: ClassVar[str] = ".tflite"


@dataclass(frozen=True)
class QnnModel(Artifact):
    """A folder for Qualcomm's Hexagon: QDQ ONNX, EPContext ONNX with its context binary, and a DLC."""

    kind: ClassVar[str] = "QnnModel"
    runtime: ClassVar[str] = "qnn"
    suffix: ClassVar[str] = ""


@dataclass(frozen=True)
class GenaiModel(Artifact):
    """A folder for onnxruntime-genai: a decoder in ONNX, its configuration and its tokenizer."""

    kind: ClassVar[str] = "GenaiModel"
    runtime: ClassVar[str] = "genai"
    suffix: ClassVar[str] = ""


@dataclass(frozen=True)
class LiteRTLMModel(Artifact):
    """A ``.litertlm`` file for LiteRT-LM: prefill and decode, tokenizer and metadata."""

    kind: ClassVar[str] = "LiteRTLMModel"
    runtime: ClassVar[str] = "litert-lm"
    suffix: ClassVar[str] = ".litertlm"


@dataclass(frozen=True)
class CoreMLDecoder(Artifact):
    """An ``.mlpackage`` of a language model: prefill and decode as functions that share weights and cache states."""

    kind: ClassVar[str] = "CoreMLDecoder"
    runtime: ClassVar[str] = "coreml-lm"
    suffix: ClassVar[str] = ".mlpackage"


@dataclass(frozen=True)
class CoreAIDecoder(Artifact):
    """An ``.aimodel`` of a language model: prefill and decode with cache states."""

    kind: ClassVar[str] = "CoreAIDecoder"
    runtime: ClassVar[str] = "coreai-lm"
    suffix: ClassVar[str] = ".aimodel"


@dataclass(frozen=True)
class QnnDecoder(Artifact):
    """A folder for Hexagon: prefill and decode steps of fixed shape, as QDQ ONNX and, where made, contexts."""

    kind: ClassVar[str] = "QnnDecoder"
    runtime: ClassVar[str] = "qnn-lm"
    suffix: ClassVar[str] = ""
