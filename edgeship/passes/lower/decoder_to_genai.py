"""lower/decoder_to_genai: a language model to the folder that onnxruntime-genai opens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.decoder import CacheType, LanguageFacts, context_of
from edgeship.core.forms import ActivationMode
from edgeship.core.model import GenaiModel, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import AdapterRef, DataRef, Request
from edgeship.errors import LoweringError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.frontends.lora import Adapter
    from edgeship.program.program import TorchProgram

    Array = npt.NDArray[Any]

# Texts whose keys and values are looked at.
SAMPLES = 32


@dataclass(frozen=True)
class DecoderToGenai(Pass):
    """Write a folder for onnxruntime-genai: the decoder with GroupQueryAttention, its configuration and tokenizer.

    Args:
        context: positions of the cache; the model's own, at most 2048, when None.
        activations: ``dynamic`` lets the kernels of 4-bit products round activations to int8, which is faster.
        cache: how keys and values are kept. In int8 each channel has a scale, of what the finished graph writes into
            its float32 cache over texts of ``data``, which are drawn from a seed when not given.
        samples: texts that are looked at for it; 32 when None.
        adapters: LoRA adapters that are written beside the graph, which has places for them.
    """

    name: ClassVar[str] = "lower/decoder_to_genai"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
    decided: ClassVar[dict[str, str]] = {"context": "--context", "cache": "--kv-cache", "adapters": "--adapter"}

    context: int | None = None
    activations: ActivationMode = "float"
    cache: CacheType = "float32"
    data: DataRef | None = None
    samples: int | None = None
    adapters: tuple[AdapterRef, ...] = ()

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for onnxruntime-genai."""
        if reason := other_runtime(request, GenaiModel):
            return Skip(reason)
        from edgeship.core.registry import runtimes

        cache = runtimes()[request.runtime].cache_of(request.kv_cache, request.choice)
        data = request.calibration if cache == "int8" else None
        return cls(request.context, request.choice.activations, cache, data, adapters=request.adapters)

    def confirm(self, request: Request) -> None:
        """Refuse scales of no text, of texts that nothing asks for, or of a base that adapters change; adapters of
        another base."""
        if self.adapters and self.cache == "int8":
            raise UsageError(
                "the scales of an int8 cache are the base's, and adapters change its keys and values",
                fix="--kv-cache float32, or merge one adapter with --lora",
            )
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"{self.name}.samples={self.samples} looks at no text", fix="leave it out for 32")
        if self.samples is not None and self.cache != "int8":
            raise UsageError(
                f"{self.name}.samples={self.samples} has no use with a cache of {self.cache}",
                fix="leave it out; 1 and more go with --kv-cache int8",
            )
        if self.adapters:
            self._opened(request.source.path)

    def run(self, model: TorchModel, ctx: Context) -> GenaiModel:
        """Write ``genai/``. Raises `UnsupportedOpError`, `LoweringError`, `EncodingError` or `UsageError`."""
        from edgeship.core.artifact import ADAPTER_SUFFIX, ADAPTERS
        from edgeship.lowering.onnx.adapters import write_adapter
        from edgeship.lowering.onnx.decoder import export_decoder
        from edgeship.lowering.onnx.genai import GRAPH, write_configuration
        from edgeship.lowering.onnx.save import save_model
        from edgeship.lowering.onnx.weights import place_weights
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model).in_forms(forms_of(GenaiModel))
        decoder, origin = program.language()
        context = context_of(decoder, self.context)
        steps = 4 if self.cache == "int8" else 3
        ctx.progress(0, steps, "export")
        adapters = self._read_adapters(program)
        adapted = sorted({layer for matrices in adapters.values() for layer in matrices})
        graph, weights = export_decoder(program, adapted)
        ctx.progress(1, steps, "place weights")
        placements = place_weights(graph, weights, program, self.activations)
        folder = ctx.folder / "genai"
        folder.mkdir()
        ctx.progress(2, steps, "write")
        save_model(graph, folder / GRAPH, apart=True, standard=False)
        facts: dict[str, str] = {}
        if self.cache == "int8":
            ctx.progress(3, steps, "cache")
            facts |= self._narrow(folder / GRAPH, model, context)
        write_configuration(folder, decoder, origin, context)
        if adapters:
            (folder / ADAPTERS).mkdir()
        for name, matrices in adapters.items():
            write_adapter(folder / ADAPTERS / f"{name}{ADAPTER_SUFFIX}", matrices)
        return GenaiModel(
            folder,
            program.signature,
            files=("genai",),
            placements=placements,
            compute="int" if self.activations == "dynamic" else "f32",
            facts=facts,
            language=replace(LanguageFacts.of(decoder, context, self.cache), adapters=tuple(adapters)),
        )

    def _read_adapters(self, program: TorchProgram) -> dict[str, dict[str, tuple[Array, Array]]]:
        """Each adapter's matrices by layer, turned as the graph takes them and with its scale."""
        opened = self._opened(program.language()[1]) if self.adapters else {}
        found: dict[str, dict[str, tuple[Array, Array]]] = {}
        for name, adapter in opened.items():
            found[name] = {weight.removesuffix(".weight"): adapter.matrices(weight) for weight in adapter.pairs}
        return found

    def _opened(self, origin: Path) -> dict[str, Adapter]:
        """Every adapter by its name. Raises `WeightsError` or `UsageError` for one that the model of a folder cannot
        have beside it."""
        from edgeship.frontends.lora import read_adapter
        from edgeship.llm.models import build_hollow, read_config
        from edgeship.lowering.onnx.adapters import linear_layers

        model = build_hollow(read_config(origin))
        held = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(parameter.shape) for name, parameter in held.items()}
        count = Counter(id(parameter) for parameter in held.values())
        layers = linear_layers(model)
        found = {ref.name: read_adapter(Path(ref.folder), shapes) for ref in self.adapters}
        for ref in self.adapters:
            for weight in found[ref.name].pairs:
                layer = weight.removesuffix(".weight")
                if count[id(held[weight])] > 1:
                    raise UsageError(
                        f"{ref.folder} changes {layer}, whose weight another layer shares", fix="merge it with --lora"
                    )
                if layer not in layers:
                    raise UsageError(
                        f"{ref.folder} changes {layer}, which is not a linear layer", fix="merge it with --lora"
                    )
        return found

    def _narrow(self, graph: Path, model: TorchModel, context: int) -> dict[str, str]:
        """Make the caches of a written graph int8; what the artifact says of their scales."""
        from edgeship.data.batches import calibration_batches
        from edgeship.lowering.onnx.cache import largest_numbers, narrow_caches

        batches = calibration_batches(self.data, model.signature, self.samples or SAMPLES)
        texts = [batch["input_ids"].reshape(-1).tolist() for batch in batches]
        narrow_caches(graph, largest_numbers(graph, texts, context))
        where = "of the calibration data" if self.data else "drawn from a seed"
        return {"cache.scales": f"one a channel, of {len(texts)} texts {where}"}

    def ensures(self, output: Any, **inputs: Any) -> None:
        """Every weight that compression decided has a place in the file."""
        from edgeship.program.program import read_record

        placed = {placement.weight for placement in output.placements}
        missing = [name for name in read_record(inputs["model"]).encodings if name not in placed]
        if missing:
            raise LoweringError(f"weight {missing[0]} is not in {output.path.name}", fix="report this as a bug")
