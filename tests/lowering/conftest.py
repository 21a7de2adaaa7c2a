"""What the tests of the Apple lowerings share: small programs, decided weights, and a comparison with the reference."""

import dataclasses
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.compression.palette import palettize
from edgeship.compression.prune import keep_mask, magnitude_score
from edgeship.core.model import Artifact, TensorSpec
from edgeship.core.runtimes import Runtime
from edgeship.core.weights import (
    Affine,
    EncodedTensor,
    Encoding,
    Float,
    FloatTensor,
    Palette,
    PaletteTensor,
    Sparse,
    SparseTensor,
    rebuild,
    same_numbers,
)
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram


def decide_all(program: TorchProgram, encoding: Float | Affine) -> dict[str, EncodedTensor]:
    """Every weight of a layer in one encoding; per channel where a group does not divide."""
    decided: dict[str, EncodedTensor] = {}
    for use in program.record.inventory.weights:
        if use.op == "other" or use.name in program.record.aliases:
            continue
        weight = program.weights[use.name]
        if isinstance(encoding, Float):
            decided[use.name] = to_float16(weight)
            continue
        fits = encoding.group_size is None or (weight.dim() == 2 and weight.shape[1] % encoding.group_size == 0)
        one = encoding if fits else Affine(encoding.bits, encoding.symmetric)
        decided[use.name] = quantize_nearest(weight, one, axis=use.channel_axis)
    return decided


def decide(weight: torch.Tensor, encoding: Encoding, axis: int = 0) -> EncodedTensor:
    """One weight in one encoding; half of it is zero in a sparse one."""
    if isinstance(encoding, Float):
        return to_float16(weight)
    if isinstance(encoding, Palette):
        return palettize(weight, encoding)
    if isinstance(encoding, Affine):
        return quantize_nearest(weight, encoding, axis=axis)
    mask = keep_mask(magnitude_score(weight), 0.5).numpy()
    arrays = decide(weight, encoding.inner, axis).arrays()
    for role in ("values", "indices"):
        if role in arrays:
            arrays[role] = np.where(mask, arrays[role], arrays[role].dtype.type(0))
    inner = rebuild(encoding.inner, arrays)
    assert isinstance(inner, (FloatTensor, PaletteTensor)) or inner.encoding == encoding.inner
    return SparseTensor(mask, inner, encoding)


AFFINE = [
    Affine(bits, symmetric, *reach)
    for symmetric in (True, False)
    for bits in (8, 4, 3, 2)
    for reach in (("tensor",), ("channel",), *(("group", size) for size in (16, 32, 64, 128)))
]
PALETTES = [Palette(bits, channels) for bits in (1, 2, 3, 4, 6, 8) for channels in (None, 8)]
SPARSE = [
    *(Sparse(Affine(bits, True, reach)) for bits in (8, 4, 3, 2) for reach in ("tensor", "channel")),
    *(Sparse(Affine(bits, True, "group", 32)) for bits in (8, 4, 3, 2)),
    *(Sparse(palette) for palette in PALETTES),
]
# Converters take longer than twice as long for twice as many layers.
# Computed in float32, which leaves no room for a number that is nearly right.
EXACT: list[Encoding] = [
    Affine(3),
    Affine(2, False),
    Affine(4, False, "group", 32),
    Palette(3),
    Palette(4, 8),
    Sparse(Affine()),
    Sparse(Affine(3)),
    Sparse(Affine(2, True, "group", 32)),
    Sparse(Palette(6, 8)),
]

FAMILIES: dict[str, list[Encoding]] = {
    **{f"integers_{place // 12}": list(AFFINE[place : place + 12]) for place in range(0, len(AFFINE), 12)},
    "palettes": list(PALETTES),
    "sparse_0": list(SPARSE[:12]),
    "sparse_1": [*SPARSE[12:], Sparse(Float(16)), Float(16)],
}

# Groups of 128 input channels fit the first, the second and the last.
LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: torch.nn.Linear(128, 16),
    "conv": lambda: torch.nn.Conv2d(128, 16, 3, padding=1),
    "depthwise_conv": lambda: torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "conv_transpose": lambda: torch.nn.ConvTranspose2d(16, 16, 2, 2),
    "embedding": lambda: torch.nn.Embedding(40, 128),
}
SHAPES = {"linear": (3, 128), "conv": (1, 128, 4, 4), "depthwise_conv": (1, 16, 4, 4), "conv_transpose": (1, 16, 3, 3)}


class Cells(torch.nn.Module):
    """Layers side by side, one for each (operator, encoding), each with an output of its own."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: LAYERS[name.rpartition("_")[0]]() for name in names})

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(LAYERS, inputs, strict=True))
        return tuple(layer(given[name.rpartition("_")[0]]) for name, layer in self.layers.items())


def cells_program(encodings: list[Encoding], holds: Callable[[Any, Encoding], str]) -> TorchProgram:
    """One program with every kind of layer in every encoding that is held; output ``conv_3`` has encoding 3."""
    torch.manual_seed(0)
    names = [f"{op}_{index}" for index, encoding in enumerate(encodings) for op in LAYERS if not holds(op, encoding)]
    inputs = [TensorSpec(name, "f32", shape) for name, shape in SHAPES.items()]
    inputs.append(TensorSpec("embedding", "i64", (1, 5), low=0, high=39))
    examples = [*(torch.randn(shape) for shape in SHAPES.values()), torch.tensor([[3, 1, 39, 0, 7]])]
    program = make_program(Cells(names), inputs, examples, output_names=names)
    encoded = {}
    for use in program.record.inventory.weights:
        if use.op != "other":
            encoding = encodings[int(use.name.split(".")[1].rpartition("_")[2])]
            encoded[use.name] = decide(program.weights[use.name], encoding, use.channel_axis)
    assert len(encoded) == len(names)
    record = dataclasses.replace(program.record, encodings={name: item.encoding for name, item in encoded.items()})
    return dataclasses.replace(program, encoded=encoded, record=record)


def unequal(runtime: Runtime, artifact: Artifact, program: TorchProgram) -> dict[str, str]:
    """What the saved file holds otherwise than it was decided, by weight."""
    found = runtime.read_weights(artifact)
    uses = {use.name: use.op for use in program.record.inventory.weights}
    differences = {
        name: same_numbers(tensor, found[name], container_bits=runtime.container_bits(uses[name], tensor.encoding))
        for name, tensor in program.encoded.items()
    }
    return {name: difference for name, difference in differences.items() if difference}


class Function(torch.nn.Module):
    """A module of one function of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def program_of(
    function: Callable[..., Any], *shapes: tuple[int, ...], ids: tuple[int, ...] | None = None
) -> TorchProgram:
    """The program of a function of float inputs x, y ... and, last, int64 ids from 0 to 9."""
    torch.manual_seed(0)
    inputs = [TensorSpec(name, "f32", shape) for name, shape in zip("xyz", shapes, strict=False)]
    examples = [torch.randn(shape) for shape in shapes]
    if ids is not None:
        inputs.append(TensorSpec("ids", "i64", ids, low=0, high=9))
        examples.append(torch.randint(0, 10, ids))
    module = function if isinstance(function, torch.nn.Module) else Function(function)
    return make_program(module, inputs, examples)


def program_of_all(
    cases: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[int, ...] | None]],
) -> TorchProgram:
    """One program of many functions, each with inputs of its own, so that a converter starts once.

    The outputs of a case carry its name: ``case`` or ``case_1``.
    """
    torch.manual_seed(0)
    inputs, examples = [], []
    for case, (_, shapes, ids) in cases.items():
        for letter, shape in zip("xyz", shapes, strict=False):
            inputs.append(TensorSpec(f"{case}_{letter}", "f32", shape))
            examples.append(torch.randn(shape))
        if ids is not None:
            inputs.append(TensorSpec(f"{case}_ids", "i64", ids, low=0, high=9))
            examples.append(torch.randint(0, 10, ids))
    names: list[str] = []

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        waiting, results = list(tensors), []
        names.clear()
        for case, (function, shapes, ids) in cases.items():
            count = len(shapes) + (ids is not None)
            found = function(*waiting[:count])
            del waiting[:count]
            found = [found] if isinstance(found, torch.Tensor) else list(found)
            names.extend(case if place == 0 else f"{case}_{place}" for place in range(len(found)))
            results += found
        return tuple(results)

    run(*examples)
    return make_program(Function(run), inputs, examples, output_names=tuple(names))


def decibels(runtime: Runtime, artifact: Artifact, program: TorchProgram) -> float:
    """The worst signal-to-noise ratio of any output, against the program's own reference."""
    return min(decibels_by_output(runtime, artifact, program).values())


def check(runtime: Runtime, lower: Callable[..., Artifact], program: TorchProgram, step: Any, decibels: float) -> None:
    """Lower; the file holds each weight as it was decided, and each output is as the reference says."""
    artifact = lower(program, step)
    assert unequal(runtime, artifact, program) == {}
    ratios = decibels_by_output(runtime, artifact, program)
    assert {name: ratio for name, ratio in ratios.items() if ratio < decibels} == {}


def decibels_by_output(runtime: Runtime, artifact: Artifact, program: TorchProgram) -> dict[str, float]:
    """The worst signal-to-noise ratio of each output."""
    worst = {spec.name: math.inf for spec in program.signature.outputs}
    generator = np.random.default_rng(3)
    with runtime.open(artifact) as session:
        for _ in range(2):
            inputs = {
                spec.name: generator.standard_normal(spec.shape).astype(np.float32)
                if spec.dtype == "f32"
                else generator.integers(0, int(spec.high or 1) + 1, spec.shape).astype(spec.numpy_dtype)
                for spec in program.signature.inputs
            }
            found = session.run(inputs)
            with torch.no_grad():
                wanted = program.module()(*(torch.from_numpy(inputs[spec.name]) for spec in program.signature.inputs))
            for spec, reference in zip(program.signature.outputs, wanted, strict=True):
                ours, theirs = reference.double().numpy(), found[spec.name].astype(np.float64)
                assert ours.shape == theirs.shape
                signal, noise = float((ours**2).mean()), float(((ours - theirs) ** 2).mean())
                assert signal > 0
                ratio = math.inf if noise == 0 else 10 * math.log10(signal / noise)
                worst[spec.name] = min(worst[spec.name], ratio)
    return worst


AGAIN = """
import sys
from pathlib import Path
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.passes.lower.torch_to_{0} import {1}
from edgeship.program.program import read_record
model = TorchModel(Path(sys.argv[1]), None)
{1}().run(TorchModel(model.path, read_record(model).signature), Context(Path(sys.argv[2])))
"""


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def elsewhere(program: Path, folder: Path, module: str, name: str) -> dict[str, str]:
    """Lower in another process, with another hash seed."""
    folder.mkdir()
    command = [sys.executable, "-c", AGAIN.format(module, name), str(program), str(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    return digests(folder)


def damaged(data: bytes, place: int) -> bytes:
    """A file with one bit turned."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.fixture(scope="session")
def apple() -> Any:
    """The helpers of this file."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def static_program():
    """``static_program(program, bits, seed)``: a float program of one input ``x`` with int8 weights and every activation
    on a grid of three normal batches."""

    def make(program, bits, seed):
        from edgeship.compression.affine import quantize_nearest
        from edgeship.compression.calibrate import decide_activations
        from edgeship.core.weights import Affine
        from edgeship.program.rewrites import for_static_activations

        program = for_static_activations(program, bits)
        encoded = {
            use.name: quantize_nearest(program.weight(use.name), Affine(8), axis=use.channel_axis)
            for use in program.record.inventory.weights
            if use.op != "other"
        }
        record = dataclasses.replace(program.record, encodings={name: item.encoding for name, item in encoded.items()})
        program = dataclasses.replace(program, encoded=encoded, record=record)
        draw = np.random.default_rng(seed)
        shape = program.signature.inputs[0].shape
        batches = [{"x": draw.standard_normal(shape).astype(np.float32)} for _ in range(3)]
        grids = decide_activations(program, batches, bits=bits, method="minmax")
        return dataclasses.replace(program, record=dataclasses.replace(program.record, activations=grids))

    return make
