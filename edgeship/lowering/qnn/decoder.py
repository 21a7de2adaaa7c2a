"""A language model's steps for Hexagon, each a program of its own with integer grids for every activation.

    prefill: input_ids i32[1, chunk] .. -> k_new_i, v_new_i f32[1, kv_heads, chunk, head_dim]
    decode:  input_ids i32[1, 1] ..     -> logits f32[1, 1, vocabulary], k_new_i, v_new_i

Beside the tokens each takes what depends on the position, made by the host (`edgeship.llm.hosted`): ``positions``
where the model looks them up, ``cos_*`` and ``sin_*`` ``[1, T, width]``, one ``mask_*`` ``[1, 1, T, context + T]`` for
each kind of window, and the caches ``k_i`` and ``v_i`` ``[1, kv_heads, context, head_dim]``. The host writes the new
rows into its caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeship.core.model import Placement, Signature, TensorSpec
from edgeship.errors import UnsupportedOpError
from edgeship.llm.attention import Asked, Engine, Form, computed_by
from edgeship.llm.cache import FixedCache, narrowed, widened
from edgeship.llm.hosted import Host, mask_name
from edgeship.llm.models import REAL_ELEMENTS, build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.llm.probing import angles_of, rotation_kinds
from edgeship.llm.step import refuse_states
from edgeship.program.inventory import take_inventory
from edgeship.program.normalize import export_normalised
from edgeship.program.program import ProgramRecord, TorchProgram

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.decoder import Decoder

    Array = npt.NDArray[np.float32]

# Queries are scaled first: scores get a grid of their own.
FORM = Form(scaled="queries", one_row=True)
# Single tokens that calibration reads at the beginning of a text and at its end.
FIRST, LAST = 2, 6
# Inputs that are kept for each step: bytes of their caches, and how many in any case.
KEPT_BYTES, LEAST = 1 << 29, 8


class Given(Engine):
    """Attention over masks and angles that the host gave the step which is being traced.

    Args:
        inputs: of the step, by name.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor], decoder: Decoder) -> None:
        super().__init__(decoder.calls, FORM)
        self.inputs, self.decoder = inputs, decoder

    def mask(self, **asked: Any) -> None:
        """None: each attention takes the host's."""

    def attend(self, asked: Asked) -> torch.Tensor:
        """With the host's mask of the window that the layer was seen to have."""
        window = self.calls[self.count].window
        return super().attend(replace(asked, mask=self.inputs[mask_name(window)]))


class Angles(nn.Module):
    """A rotary module that answers what the host gave.

    Args:
        step: whose inputs it answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: Mapping[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """``(cos, sin)``, each ``[1, T, width]``."""
        return self.inputs[f"cos_{layer_type}"], self.inputs[f"sin_{layer_type}"]


class HostedStep(nn.Module):
    """A step whose cache, masks and angles are given; it answers the logits and the rows for the cache.

    Args:
        names: of the inputs, in order.
    """

    def __init__(self, model: Any, decoder: Decoder, names: Sequence[str], *, logits: bool) -> None:
        super().__init__()
        self.model, self.decoder, self.names, self.logits = model, decoder, tuple(names), logits

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the tokens."""
        given = dict(zip(self.names, inputs, strict=True))
        count = len(self.decoder.layers)
        cache = _Joined(
            [given[f"k_{i}"] for i in range(count)], [given[f"v_{i}"] for i in range(count)], self.decoder.numbers
        )
        ids = given["input_ids"]
        positions = given.get("positions", torch.zeros((1, ids.shape[1]), dtype=torch.int64))
        for module in self.model.modules():
            if isinstance(module, Angles):
                module.inputs = given
        with computed_by(Given(given, self.decoder)):
            call = self.model if self.logits else getattr(self.model, self.model.base_model_prefix)
            answer = call(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        head = (answer.logits,) if self.logits else ()
        return (*head, *(cache.rows["k", i] for i in range(count)), *(cache.rows["v", i] for i in range(count)))


class _Joined(FixedCache):
    """A cache whose new rows stand after it; they are kept for the host."""

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], numbers: Mapping[int, int]
    ) -> None:
        super().__init__(keys, values, torch.zeros((), dtype=torch.int64), lambda cache, rows, _: cache, numbers)
        self.rows: dict[tuple[str, int], torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.place(layer_idx)
        found = []
        for kind, caches, rows in (("k", self.keys, key_states), ("v", self.values, value_states)):
            width = int(caches[place].shape[-1])
            self.rows[kind, place] = widened(rows, width)
            joined = torch.cat([caches[place], self.rows[kind, place]], 2)
            found.append(narrowed(joined, int(rows.shape[-1])))
        return found[0], found[1]


@dataclass(frozen=True)
class Step:
    """A step, and what the scoring program calls its weights: name here -> name there."""

    program: TorchProgram
    names: Mapping[str, str]

    @property
    def tokens(self) -> int:
        """How many it takes."""
        return self.program.signature.inputs[0].shape[1]

    def runner(
        self, shared: dict[str, torch.Tensor] | None = None
    ) -> Callable[[Mapping[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]:
        """Runs it in torch, from inputs in their order to answers by name.

        Args:
            shared: weights of other steps in float32 by the scoring program's names; this one's are added.
        """
        shared = {} if shared is None else shared
        floats = dict(self.program.weights)
        for name in self.program.encoded:
            if self.names[name] not in shared:
                shared[self.names[name]] = self.program.weight(name)
            floats[name] = shared[self.names[name]]
        module = replace(self.program, weights=floats, encoded={}).module()
        names = [spec.name for spec in self.program.signature.outputs]

        def run(given: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
            with torch.no_grad():
                answers = module(*(torch.from_numpy(value) for value in given.values()))
            return {name: value.numpy() for name, value in zip(names, answers, strict=True)}

        return run


def write_step(step: Step, graph: Path, htp_arch: int) -> tuple[Placement, ...]:
    """Write a step whose activations are decided as a QDQ graph for Hexagon; where it keeps each weight."""
    from edgeship.lowering.onnx.activations import store_activations
    from edgeship.lowering.onnx.export import export_graph
    from edgeship.lowering.onnx.save import save_model
    from edgeship.lowering.onnx.weights import place_weights
    from edgeship.lowering.qnn.whole import rewrite_graph

    model, weights = export_graph(step.program)
    # What only the head reads is not in prefill: the last layer's experts, or its network beside the attention.
    placements = place_weights(model, weights, step.program, "int16", partial=step.tokens > 1)
    store_activations(model, step.program)
    with TemporaryDirectory(prefix="edgeship-qnn-") as folder:
        save_model(model, Path(folder) / "model.onnx")
        rewrite_graph(Path(folder) / "model.onnx", graph, htp_arch)
    return tuple(replace(placement, weight=step.names[placement.weight]) for placement in placements)


def record_steps(
    steps: Mapping[int, Step], host: Host, texts: Iterable[Sequence[int]], most: int
) -> dict[int, list[dict[str, npt.NDArray[Any]]]]:
    """What steps are given while they read texts: tokens of a step -> its inputs.

    Each text begins with single tokens, is begun again in whole chunks, and ends in single tokens.

    Args:
        steps: by tokens that they take: 1 and the chunk.
        most: inputs of whole chunks; of single tokens `FIRST` and `LAST` times as many. Fewer where caches are large.
    """
    found: dict[int, list[dict[str, npt.NDArray[Any]]]] = {tokens: [] for tokens in steps}
    shared: dict[str, torch.Tensor] = {}
    runners = {tokens: step.runner(shared) for tokens, step in steps.items()}
    chunk = max(steps)
    room = max(LEAST, KEPT_BYTES // sum(cache.nbytes for cache in host.caches.values()))
    limits = {tokens: min(room, most if tokens > 1 else most * (FIRST + LAST)) for tokens in steps}

    def read(tokens: Sequence[int]) -> None:
        given = host.inputs(tokens)
        if len(found[len(tokens)]) < limits[len(tokens)]:
            found[len(tokens)].append({name: value.copy() for name, value in given.items()})
        host.take(runners[len(tokens)](given), len(tokens))

    for text in texts:
        text = text[: host.context]
        host.reset()
        for token in text[:FIRST]:
            read([token])
        host.reset()
        whole = (len(text) - FIRST) // chunk * chunk
        for start in range(0, whole, chunk):
            read(text[start : start + chunk])
        for token in text[whole : whole + LAST]:
            read([token])
        if all(len(inputs) >= limits[tokens] for tokens, inputs in found.items()):
            break
    host.reset()
    return found


def angle_tables(program: TorchProgram, context: int) -> dict[str, Array]:
    """``cos_<kind>`` and ``sin_<kind>``, ``[context, width]``, of the model's rotations; none when it has none."""
    tables: dict[str, Array] = {}
    for module in _hollow(program)[0].modules():
        for kind in rotation_kinds(module):
            cos, sin = angles_of(module, torch.arange(context), kind)
            tables[f"cos_{kind}"], tables[f"sin_{kind}"] = cos.numpy(), sin.numpy()
    return tables


def step_program(program: TorchProgram, host: Host, tokens: int, *, logits: bool) -> Step:
    """One step as a program of its own, whose weights are those of the scoring program.

    Args:
        host: for the names and shapes of what it gives.

    Raises:
        LoweringError: a weight is looked up while the step is exported.
    """
    decoder = program.record.decoder
    assert decoder is not None
    refuse_states(decoder, "a step for Hexagon")
    model, names = _hollow(program)
    for name, module in list(model.named_modules()):
        if rotation_kinds(module):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Angles())
    for name, weight in names.items():
        if program.weights[weight].numel() <= REAL_ELEMENTS and weight not in program.encoded:
            owner, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(program.weights[weight].float(), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, value)
    examples = host.inputs([0] * tokens)
    step = HostedStep(model, decoder, list(examples), logits=logits).eval()
    given = tuple(torch.from_numpy(value) for value in examples.values())
    exported = export_normalised(step, given, tuple(examples), prefix="model")
    outputs = [TensorSpec("logits", "f32", (1, tokens, decoder.vocabulary))] if logits else []
    for kind in "kv":
        for i, layer in enumerate(decoder.layers):
            outputs.append(TensorSpec(f"{kind}_new_{i}", "f32", (1, layer.kv_heads, tokens, layer.head_dim)))
    inputs = [
        TensorSpec(name, "f32" if value.dtype.kind == "f" else "i32", value.shape) for name, value in examples.items()
    ]
    parameters = {name: names[name] for name in exported.state_dict if name in names}
    main = {weight: name for name, weight in reversed(parameters.items())}
    aliases = {name: main[weight] for name, weight in parameters.items() if main[weight] != name}
    weights = {name: program.weights[parameters[name]] for name in parameters if name not in aliases}
    weights |= {name: value for name, value in exported.state_dict.items() if name not in parameters}
    encoded = {name: program.encoded[w] for w, name in main.items() if w in program.encoded}
    record = ProgramRecord(
        Signature(tuple(inputs), tuple(outputs)),
        take_inventory(exported),
        encodings={name: tensor.encoding for name, tensor in encoded.items()},
        aliases=aliases,
    )
    return Step(TorchProgram(exported, weights, encoded, record), parameters)


def _hollow(program: TorchProgram) -> tuple[Any, dict[str, str]]:
    decoder, origin = program.language()
    if not decoder.is_whole or decoder.counted or decoder.masked:
        raise UnsupportedOpError(
            "Hexagon's steps are given their masks, and some layers of this model attend in another way",
            fix="leave qnn-lm out with --runtime",
        )
    model = build_hollow(read_config(origin))
    return model, program_names(model, program)
