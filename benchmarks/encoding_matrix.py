"""Every encoding in every runtime: store it, read it back, run it; docs/results/encodings.md.

    python benchmarks/encoding_matrix.py [--runtime NAME ...]

A *cell* is one kind of layer with its weight in one encoding, computed with one kind of activations, in one runtime.
What ``Runtime.holds`` refuses is listed with its reason. What it allows is lowered and then checked twice: the weight
read back from the saved file equals what was decided, bit for bit, and the layer's output equals that of the torch
program with the dequantized weight. ``tests/contracts/test_encodings.py`` asserts the same cells.

Cells of one runtime, kind of activations and width are layers of one program, side by side, each with an output of its
own: a converter starts once for all of them, and a failing cell is still named.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.compression.lpbq import quantize_npu_block
from edgeship.compression.palette import palettize
from edgeship.compression.prune import keep_mask, magnitude_score
from edgeship.core.encodings import families
from edgeship.core.encodings.mxfp4 import BLOCK
from edgeship.core.forms import Form
from edgeship.core.model import Artifact, TensorSpec, TorchModel
from edgeship.core.passes import Context, Pass
from edgeship.core.registry import runtimes
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import (
    MXFP4,
    Affine,
    EncodedTensor,
    Encoding,
    Float,
    FloatTensor,
    Palette,
    PaletteTensor,
    Sparse,
    SparseTensor,
    same_numbers,
)
from edgeship.errors import EdgeshipError
from edgeship.program.compare import OutputError, Reference
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram
from edgeship.runtimes.coreml.forms import IOS18, lacking

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "encodings.md"
MODES: tuple[ActivationMode, ...] = get_args(ActivationMode)
STATIC_BITS = {"int8": 8, "int16": 16}
GROUPS = (16, 32, 64, 128)
SPARSITY = 0.5
SAMPLES = 3


@dataclass(frozen=True)
class Layer:
    """A layer with one weight.

    Args:
        op: as inventories call it. takes: the input it reads.
        awkward: sizes that nothing divides: odd rows, ends of packed bytes.
    """

    name: str
    op: str
    make: Callable[[], nn.Module]
    takes: str
    awkward: bool = False


class Scaled(nn.Module):
    """A product with a vector: a weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(256) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


INPUTS = {
    "rows": TensorSpec("rows", "f32", (1, 4, 256)),
    "odd_rows": TensorSpec("odd_rows", "f32", (1, 3, 75)),
    "image": TensorSpec("image", "f32", (1, 16, 10, 10)),
    "rgb": TensorSpec("rgb", "f32", (1, 3, 9, 9)),
    "deep": TensorSpec("deep", "f32", (1, 256, 3, 3)),
    "ids": TensorSpec("ids", "i64", (1, 5), low=0, high=36),
}
LAYERS = (
    Layer("linear", "linear", lambda: nn.Linear(256, 24), "rows"),
    Layer("linear 75 x 10", "linear", lambda: nn.Linear(75, 10), "odd_rows", awkward=True),
    Layer("conv", "conv", lambda: nn.Conv2d(16, 24, 3, 2, 1), "image"),
    Layer("conv of 3 channels", "conv", lambda: nn.Conv2d(3, 10, 3), "rgb", awkward=True),
    Layer("pointwise conv", "conv", lambda: nn.Conv2d(256, 16, 1), "deep"),
    Layer("grouped conv", "conv", lambda: nn.Conv2d(16, 16, 3, groups=4, bias=False), "image", awkward=True),
    Layer("depthwise conv", "depthwise_conv", lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), "image"),
    Layer("transposed conv", "conv_transpose", lambda: nn.ConvTranspose2d(16, 8, 2, 2), "image"),
    Layer("embedding", "embedding", lambda: nn.Embedding(40, 256), "ids"),
    Layer("embedding 37 x 21", "embedding", lambda: nn.Embedding(37, 21), "ids", awkward=True),
    Layer("vector", "other", Scaled, "rows", awkward=True),
)
ENCODINGS: tuple[Encoding, ...] = (
    Float(32),
    Float(16),
    *(
        encoding
        for bits in (8, 4, 3, 2)
        for symmetric in (True, False)
        for encoding in (
            Affine(bits, symmetric, "tensor"),
            Affine(bits, symmetric),
            *(Affine(bits, symmetric, "group", size) for size in GROUPS),
        )
    ),
    *(Palette(bits, channels) for bits in (8, 6, 4, 3, 2, 1) for channels in (None, 8)),
    MXFP4(),
    *(Sparse(inner) for inner in (Float(16), Affine(8), Affine(4), Palette(4))),
)
QUICK: tuple[Encoding, ...] = (
    Affine(8), Affine(4), Affine(4, True, "group", 32), Affine(4, False, "group", 32), Affine(3), Affine(2),
    Palette(4, 8), MXFP4(), Sparse(Affine(8)),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One thing to hold."""

    runtime: str
    layer: Layer
    encoding: Encoding
    activations: ActivationMode

    def __str__(self) -> str:
        return f"{self.runtime}: {self.layer.name}, {self.encoding}, {self.activations} activations"

    @property
    def refused(self) -> str:
        """Why the runtime does not hold it; empty when it does."""
        return runtimes()[self.runtime].holds(self.layer.op, self.encoding, self.activations)  # type: ignore[arg-type]

    @property
    def family(self) -> str:
        """Cells of one family are lowered together."""
        return f"{self.encoding.kind}{self.encoding.bits}"

    @property
    def fits(self) -> bool:
        """Whether the layer's sizes allow this encoding at all."""
        weight = self.layer.make().weight
        encoding = self.encoding.inner if isinstance(self.encoding, Sparse) else self.encoding
        if isinstance(encoding, Affine) and encoding.group_size is not None:
            axis = 0 if self.layer.op == "conv_transpose" else 1
            return weight.dim() > 1 and axis == 1 and weight.shape[1] % encoding.group_size == 0
        if isinstance(encoding, Palette) and encoding.group_channels is not None:
            return bool(weight.shape[0] % encoding.group_channels == 0)
        if isinstance(encoding, MXFP4):
            return weight.dim() > 1 and self.layer.op != "conv_transpose" and weight.shape[1] % BLOCK == 0
        return True

    @property
    def system(self) -> str:
        """The version of iOS that Core ML's cells are lowered for: 18, and 26 for what only that one has."""
        return "iOS26" if lacking(self.encoding, IOS18) else "iOS18"


@dataclass(frozen=True)
class Outcome:
    """What came of one cell.

    Args:
        problem: empty, or what is not exact. snr_db: against the dequantized reference.
        steps: largest difference, in steps of the output's grid, where it has one.
    """

    problem: str
    snr_db: float = math.nan
    steps: float | None = None


def networks() -> list[str]:
    """Runtimes that take any network. Engines for language models store as their family does, in the same formats."""
    return sorted(name for name, runtime in runtimes().items() if not runtime.engine.for_language)


def cells(runtime: str, *, quick: bool = False) -> list[Cell]:
    """Every cell of one runtime whose sizes fit, refused ones included; ``quick`` takes a few encodings of each kind."""
    every = [
        Cell(runtime, layer, encoding, mode)
        for mode in MODES
        for encoding in ENCODINGS
        for layer in LAYERS
        if not quick or (not layer.awkward and encoding in QUICK)
    ]
    return [cell for cell in every if cell.fits]


def check(batch: Sequence[Cell]) -> dict[Cell, Outcome]:
    """Store, read back and run cells of one runtime and one kind of activations.

    When one of them cannot even be lowered, they are tried in halves until it stands alone.
    """
    if not batch:
        return {}
    try:
        return _check_together(batch)
    except Exception as error:  # converters raise anything
        if len(batch) == 1:
            reason = str(error) if isinstance(error, EdgeshipError) else f"{type(error).__name__}: {error}"
            return {batch[0]: Outcome(" ".join(reason.split())[:300])}
        print(f"{len(batch)} cells like {batch[0]} are tried apart: {error}", file=sys.stderr)
    middle = len(batch) // 2
    return {**check(batch[:middle]), **check(batch[middle:])}


def _check_together(batch: Sequence[Cell]) -> dict[Cell, Outcome]:
    runtime, mode = runtimes()[batch[0].runtime], batch[0].activations
    program = _program(batch)
    with tempfile.TemporaryDirectory() as folder:
        artifact = lower(program, batch[0].runtime, mode, Path(folder))
        stored = runtime.read_weights(artifact)
        outcomes = {cell: OutputError() for cell in batch}
        reference = Reference(program)
        with runtime.open(artifact) as session:
            for number in range(SAMPLES):
                inputs = _inputs(program, number, batch[0])
                given = {spec.name: inputs[spec.name].astype(spec.numpy_dtype) for spec in artifact.signature.inputs}
                wanted, found = reference.run(inputs), session.run(given)
                for place, cell in enumerate(batch):
                    outcomes[cell].add(wanted[f"y{place}"], found[f"y{place}"])
    results = {}
    for place, cell in enumerate(batch):
        name = f"layers.{place}.weight"
        problem = "not stored"
        if name in stored:
            bits = runtime.container_bits(cell.layer.op, cell.encoding)  # type: ignore[arg-type]
            problem = same_numbers(program.encoded[name], stored[name], container_bits=bits)
        error = outcomes[cell]
        steps = None if mode not in STATIC_BITS else error.max_error / _output_scale(program, place)
        limit = limit_of(cell, artifact)
        if not error.has_signal:
            problem = problem or "the reference says nothing"
        elif steps is not None and steps > limit:
            problem = problem or f"{steps:.1f} steps from the reference, {limit:g} allowed"
        elif steps is None and error.snr_db < limit:
            problem = problem or f"{error.snr_db:.0f} dB from the reference, {limit:g} asked for"
        results[cell] = Outcome(problem, error.snr_db, steps)
    return results


def limit_of(cell: Cell, artifact: Artifact) -> float:
    """Steps of the output's grid with static activations; else the least ratio in dB."""
    if cell.runtime == "qnn" and cell.activations == "int16" and cell.encoding.bits < 8:
        # Hexagon rounds these products. Not derived but chosen after measuring: 91 steps at most when right (int3,
        # depthwise), 267 at least with one integer off by one. That the numbers are exact rests on the read-back.
        return 150.0
    if cell.activations in STATIC_BITS:
        # Everything may break a tie another way; float16 cannot write every step of a grid of 255 exactly.
        return 2.01 if cell.runtime == "qnn" else 1.06
    return 55.0 if artifact.compute == "f16" else 100.0


class SideBySide(nn.Module):
    """Layers that share inputs; an output each."""

    def __init__(self, batch: Sequence[Cell], names: Sequence[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(cell.layer.make() for cell in batch)
        self.takes = [names.index(cell.layer.takes) for cell in batch]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(inputs[place]) for layer, place in zip(self.layers, self.takes, strict=True))


def _program(batch: Sequence[Cell]) -> TorchProgram:
    torch.manual_seed(0)
    specs = [spec for name, spec in INPUTS.items() if any(cell.layer.takes == name for cell in batch)]
    module = SideBySide(batch, [spec.name for spec in specs]).eval()
    examples = [torch.zeros(spec.shape, dtype=torch.float32 if spec.dtype == "f32" else torch.int64) for spec in specs]
    names = [f"y{place}" for place in range(len(batch))]
    program = make_program(module, specs, examples, output_names=names)
    encoded = {}
    for place, cell in enumerate(batch):
        name = f"layers.{place}.weight"
        use = program.record.inventory.weight(name)
        assert use.op == cell.layer.op, (use, cell)
        weight = program.weight(name).detach()
        if cell.runtime == "qnn" and str(cell.encoding).count("group"):
            encoded[name] = quantize_npu_block(weight, cell.encoding)  # type: ignore[arg-type]
        else:
            encoded[name] = encode(weight, cell.encoding, use.channel_axis)
    record = replace(program.record, encodings={name: tensor.encoding for name, tensor in encoded.items()})
    program = replace(program, encoded=encoded, record=record)
    bits = STATIC_BITS.get(batch[0].activations)
    if bits is None:
        return program
    from edgeship.program.rewrites import for_static_activations

    program = for_static_activations(program, bits)
    batches = [_inputs(program, number, batch[0]) for number in range(SAMPLES)]
    grids = decide_activations(program, batches, bits=bits, method="minmax")
    return replace(program, record=replace(program.record, activations=grids))


def encode(weight: torch.Tensor, encoding: Encoding, axis: int) -> EncodedTensor:
    """A weight in any encoding, by the plainest algorithm."""
    if isinstance(encoding, Float):
        return FloatTensor(weight.numpy().astype(np.float16 if encoding.bits == 16 else np.float32))
    if isinstance(encoding, Palette):
        return palettize(weight, encoding)
    if isinstance(encoding, Affine):
        return quantize_nearest(weight, encoding, axis=axis)
    if not isinstance(encoding, Sparse):
        return encoding.encode(weight.numpy(), axis=axis)
    kept = keep_mask(magnitude_score(weight), SPARSITY)
    inner = encode(torch.where(kept, weight, 0.0), encoding.inner, axis)
    mask = kept.numpy()
    if isinstance(inner, PaletteTensor):
        inner = replace(inner, indices=np.where(mask, inner.indices, 0).astype(np.uint8))
    return SparseTensor(mask, inner, encoding)  # type: ignore[arg-type]


def _inputs(program: TorchProgram, number: int, cell: Cell) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs. For dynamic activations, integers that any grid decided while running holds exactly."""
    generator = np.random.default_rng(number)
    found = {}
    for spec in program.signature.inputs:
        if spec.dtype != "f32":
            found[spec.name] = generator.integers(0, int(spec.high or 0) + 1, spec.shape)
        elif cell.activations == "dynamic":
            found[spec.name] = _on_dynamic_grid(generator, spec.shape, symmetric=cell.runtime == "onnx")
        else:
            found[spec.name] = generator.standard_normal(spec.shape).astype(np.float32)
    return found


def _on_dynamic_grid(generator: Any, shape: tuple[int, ...], *, symmetric: bool) -> Any:
    """Integers whose extremes recur every 16 values: -127..127 where kernels take ``max|x| / 127``, in blocks of 16 and
    more, and -128..127 where they take ``(max - min) / 255`` over a row or an image."""
    values = generator.integers(-60, 61, shape).astype(np.float32)
    flat = values.reshape(-1) if len(shape) == 4 else values.reshape(-1, shape[-1])
    flat[..., 3::16] = 127
    flat[..., 8::16] = -127 if symmetric else -128
    return values


def _output_scale(program: TorchProgram, place: int) -> float:
    (output,) = [node for node in program.exported.graph.nodes if node.op == "output"]
    return program.activations[output.args[0][place].name].scale


def lower(program: TorchProgram, runtime: str, mode: ActivationMode, folder: Path) -> Artifact:
    """The artifact of a program, in a folder under ``folder``."""
    program.save(folder / "program")
    model: Any = TorchModel(folder / "program", program.signature)
    halves = [str(encoding).endswith("float16") for encoding in program.record.encodings.values()]
    compute = "float16" if all(halves) else "float32"
    new = any(lacking(encoding, IOS18) for encoding in program.record.encodings.values())
    for number, step in enumerate(_steps(runtime, mode, compute, "iOS26" if new else "iOS18")):
        (folder / str(number)).mkdir()
        made = step.run(model, Context(folder / str(number)))
        step.ensures(made, model=model)
        model = made
    return model  # type: ignore[no-any-return]


def _steps(runtime: str, mode: ActivationMode, compute: Any, system: Any) -> list[Pass]:
    from edgeship.passes.lower.onnx_to_qnn import OnnxToQnn
    from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
    from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
    from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
    from edgeship.passes.lower.torch_to_tflite import TorchToTFLite

    steps: dict[str, list[Pass]] = {
        "onnx": [TorchToOnnx(mode)],
        "qnn": [TorchToOnnx(mode), OnnxToQnn(57, 75)],
        "tflite": [TorchToTFLite(mode)],
        "coreml": [TorchToCoreML(system, compute)],
        "coreai": [TorchToCoreAI(compute)],
    }
    return steps[runtime]


def batches(found: Iterable[Cell], *, together: bool = False) -> dict[str, list[Cell]]:
    """Allowed cells by what is lowered together: activations and width, or activations alone."""
    made: dict[str, list[Cell]] = {}
    for cell in found:
        if not cell.refused:
            new = cell.runtime == "coreml" and cell.system == "iOS26"
            alone = " iOS26" if new else ""
            key = f"{cell.activations}{alone}" if together else f"{cell.activations} {cell.family}"
            made.setdefault(key, []).append(cell)
    return made


# The page.

TITLES = {"linear": "linear", "conv": "conv", "depthwise_conv": "depthwise", "conv_transpose": "transposed conv",
          "embedding": "embedding", "other": "vector"}  # fmt: skip
HEADER = """# Encodings: what each runtime holds exactly

Made by `python benchmarks/encoding_matrix.py`; `tests/contracts/test_encodings.py` asserts the same cells. Versions: {versions}.

A cell is a layer with its weight in one encoding, computed with one kind of activations. Every cell with a figure was
lowered, read back from the saved file (integers, scales, zero points, tables and masks equal what was decided, bit for bit)
and run: the figure is the worst ratio of any such layer's output to the torch program with the same dequantized weight, in
dB (200 means equal). Float arithmetic differs by the order of sums only. Static activations answer within a step of the
output's grid. Hexagon may be two steps off, and up to 150 of 65,535 with weights below 8 bits and 16-bit activations: it
rounds those products, and the figures show how much. That limit was chosen after measuring: right cells came to 91 steps at
most, one integer off by one made 267 at least. Dynamic activations are given inputs that their grids hold exactly,
so that what is measured is the weight.
A cell with a letter is refused while planning, for the reason below its table; "-" is a size that does not exist.

Layers: {layers}.
"""


def write_page(runtime_names: Sequence[str]) -> dict[Cell, Outcome]:
    """Run every cell of some runtimes, and write the page again. Sections of the other runtimes stay as they are."""
    results: dict[Cell, Outcome] = {}
    sections = kept_sections(PAGE.read_text() if PAGE.is_file() else "")
    for name in runtime_names:
        found = cells(name)
        outcomes: dict[Cell, Outcome] = {}
        for key, batch in batches(found).items():
            begin = time.perf_counter()
            outcomes.update(check(batch))
            print(f"{name} {key}: {len(batch)} cells, {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        results.update(outcomes)
        sections[runtimes()[name].title] = section(name, found, outcomes)
    versions = {
        package: version
        for one in map(runtimes().__getitem__, networks())
        for package, version in one.versions().items()
    }
    listed = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    head = HEADER.format(versions=listed, layers="; ".join(layer.name for layer in LAYERS))
    titles = [runtimes()[name].title for name in networks()]
    PAGE.write_text("\n".join([head, summary(), *(sections[title] for title in titles if title in sections)]))
    return results


def kept_sections(page: str) -> dict[str, str]:
    """Title -> text of each section of a written page."""
    sections = {}
    for text in page.split("\n## ")[1:]:
        title, _, _ = text.partition("\n")
        sections[title] = "## " + text.rstrip("\n") + "\n"
    return sections


def summary() -> str:
    """Encodings by runtimes: bits in the file and while running, for a linear layer with the first kind of activations
    that holds it."""
    names = networks()
    lines = [
        "## Linear layers at a glance",
        "",
        "Bits of a weight in the file / in memory while running, with the activations in which the runtime holds it.",
        "",
        "| encoding | " + " | ".join(runtimes()[name].title for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for encoding in ENCODINGS:
        row = []
        for name in names:
            runtime = runtimes()[name]
            modes = [mode for mode in MODES if not runtime.holds("linear", encoding, mode)]
            stored = runtime.container_bits("linear", encoding)
            resident = [runtime.resident_bits("linear", encoding, mode) for mode in modes]
            spread = "-".join(map(str, sorted(set(resident))))
            row.append(f"{stored} / {spread} ({', '.join(modes)})" if modes else "no")
        lines.append(f"| {encoding} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *mechanisms(names)])


def mechanisms(names: Sequence[str]) -> list[str]:
    """What each format stores of each family, and how: the table of `edgeship.core.forms` in words."""
    kinds = list(families())
    lines = ["## Mechanisms", "", "| runtime | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for name in names:
        rows = [runtimes()[name].forms.row(family) for family in families().values()]
        entries = [row.how if isinstance(row, Form) else "no" for row in rows]
        lines.append(f"| {runtimes()[name].title} | " + " | ".join(entries) + " |")
    return [*lines, ""]


def section(name: str, found: Sequence[Cell], outcomes: dict[Cell, Outcome]) -> str:
    """Encodings by operators for each kind of activations of one runtime, and the reasons."""
    runtime = runtimes()[name]
    lines = [f"## {runtime.title}", ""]
    by_row: dict[tuple[ActivationMode, Encoding], dict[str, list[Cell]]] = {}
    for cell in found:
        by_row.setdefault((cell.activations, cell.encoding), {}).setdefault(cell.layer.op, []).append(cell)
    reasons: dict[str, str] = {}
    for mode in MODES:
        if not any(not cell.refused for cell in found if cell.activations == mode):
            refused = {cell.refused for cell in found if cell.activations == mode}
            lines += [f"No {mode} activations: {min(refused, key=len)}.", ""]
            continue
        lines += [f"### {mode} activations", "", "| encoding | " + " | ".join(TITLES.values()) + " | bits in file |"]
        lines.append("|---" * (len(TITLES) + 2) + "|")
        for encoding in ENCODINGS:
            here = by_row.get((mode, encoding), {})
            row = [_entry(here.get(op, []), outcomes, reasons) for op in TITLES]
            lines.append(f"| {encoding} | " + " | ".join(row) + f" | {runtime.container_bits('linear', encoding)} |")
        lines.append("")
    lines += [f"- {letter}: {reason}." for reason, letter in reasons.items()]
    return "\n".join([*lines, ""])


def _entry(row: Sequence[Cell], outcomes: dict[Cell, Outcome], reasons: dict[str, str]) -> str:
    if not row:
        return "-"
    done = [outcomes[cell] for cell in row if cell in outcomes]
    if not done:
        return reasons.setdefault(row[0].refused, _letters(len(reasons)))
    if any(outcome.problem for outcome in done):
        return "FAIL"
    return f"{min(outcome.snr_db for outcome in done):.0f}"


def _letters(number: int) -> str:
    return (chr(96 + number // 26) if number >= 26 else "") + chr(97 + number % 26)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", action="append", help="only these; repeat for several")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = write_page(arguments.runtime or networks())
    failed = {cell: outcome for cell, outcome in results.items() if outcome.problem}
    for cell, outcome in failed.items():
        print(f"FAIL {cell}: {outcome.problem}")
    print(f"{len(results)} cells, {len(failed)} failed; {PAGE}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
