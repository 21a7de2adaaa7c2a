"""Fixtures for every test: a cache of the session's own, paths, the command line, and models built once."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeship.core.model import OnnxModel, TensorSpec, TFLiteModel, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import EncodedTensor
from edgeship.program.program import TorchProgram

ROOT = Path(__file__).resolve().parents[1]
# Before anything imports torch, which the lines above do not: two workers of `make test` are the machine's two cores.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Most tests change something in this process; what runs in others is asked in tests/engine/test_beside.py.
os.environ.setdefault("EDGESHIP_JOBS", "1")


@dataclass(frozen=True)
class Ran:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error lines."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and data that are no part of the repository; ``EDGESHIP_SHARED`` says where else they are."""
    place = Path(os.environ.get("EDGESHIP_SHARED", ROOT.parent / "shared"))
    if not (place / "data").is_dir():
        pytest.skip(f"{place} is not there; EDGESHIP_SHARED names the folder with the shared models")
    return place


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all workers of a session, and none of the user's."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "edgeship-cache"
    os.environ["EDGESHIP_CACHE"] = str(place)
    return place


@contextmanager
def _captured() -> Iterator[tuple[Path, Path]]:
    """File descriptors 1 and 2, and Python's streams on them, in two files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "out"), Path(folder, "err")
        streams = sys.stdout, sys.stderr
        saved = os.dup(1), os.dup(2)
        opened = []
        try:
            for number, path in zip((1, 2), paths, strict=True):
                with path.open("wb") as file:
                    os.dup2(file.fileno(), number)
                opened.append(os.fdopen(os.dup(number), "w", encoding="utf-8", errors="replace", buffering=1))
            sys.stdout, sys.stderr = opened
            yield paths
        finally:
            sys.stdout, sys.stderr = streams
            for stream in opened:
                stream.close()
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)


def call_cli(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ran:
    """Run ``edgeship`` in this process, where the libraries are loaded already."""
    from edgeship.cli.main import answer

    before, environment, place = sys.argv, dict(os.environ), Path.cwd()
    code = 0
    with _captured() as (out, err):
        try:
            sys.argv = ["edgeship", *map(str, arguments)]
            os.environ.update(env or {})
            os.chdir(cwd or place)
            code = answer()
        finally:
            os.chdir(place)
            sys.argv = before
            os.environ.clear()
            os.environ.update(environment)
        sys.stdout.flush()
        sys.stderr.flush()
        return Ran(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def spawn_cli(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ran:
    """Run ``edgeship`` in a process of its own."""
    command = [sys.executable, "-m", "edgeship.cli.main", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Ran]:
    """``cli("build", ...)`` in this process, started in ``tmp_path``; returns `Ran`."""

    def run(*arguments: object, cwd: Path = tmp_path, env: Mapping[str, str] | None = None) -> Ran:
        return call_cli(*arguments, cwd=cwd, env=env)

    return run


@pytest.fixture
def cli_process(tmp_path: Path) -> Callable[..., Ran]:
    """``cli_process("build", ...)`` in a process of its own, started in ``tmp_path``; returns `Ran`."""

    def run(*arguments: object, cwd: Path = tmp_path, env: Mapping[str, str] | None = None) -> Ran:
        return spawn_cli(*arguments, cwd=cwd, env=env)

    return run


@pytest.fixture
def frozen() -> Iterator[None]:
    """What is loaded already is left out of collections: `gc.collect` walks what a test made, and not all of torch."""
    from edgeship.program.collector import few_collections

    with few_collections():
        yield


TINY = """
import torch
from torch import nn


def model():
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    layers[1].running_mean.uniform_(-0.5, 0.5)
    layers[1].running_var.uniform_(0.5, 2)
    return layers.eval()
"""


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A factory whose model builds in a second or two; its input is ``image:f32[1,1,4,4]``."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.py"
    path.write_text(TINY)
    return f"{path}:model"


@pytest.fixture(scope="session")
def tiny_order(tiny_source: str) -> tuple[str, ...]:
    """What makes ``edgeship build`` build the tiny model for one runtime."""
    return (tiny_source, "--input", "image:f32[1,1,4,4]", "--target", "linux-x86", "--runtime", "onnx")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_order: tuple[str, ...]) -> Path:
    """The tiny model as a bundle with one ONNX artifact. Copy it before changing it."""
    output = tmp_path_factory.mktemp("tiny_bundle") / "tiny.edgeship"
    ran = call_cli("build", *tiny_order, "-o", output)
    assert ran.code == 0, ran.err
    return output


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits_cnn at ``balanced`` for two phones: all five artifacts. Tests carry ``xdist_group("digits")``."""
    output = tmp_path_factory.mktemp("digits") / "digits_cnn.edgeship"
    phones = ("--target", "iphone15pro", "--target", "galaxy-s24")
    ran = spawn_cli("build", ROOT / "samples" / "digits_cnn", *phones, "-o", output)
    assert ran.code == 0, ran.err
    return output


@pytest.fixture(scope="session")
def layers_program() -> TorchProgram:
    """One small program with every kind of layer that has a weight: inputs x and ids, outputs image and text."""
    import torch
    from torch import nn
    from torch.nn import functional

    from edgeship.program.export import make_program

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, 2, 1)
            self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.pointwise = nn.Conv2d(32, 64, 1)
            self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4, bias=False)
            self.up = nn.ConvTranspose2d(64, 16, 2, 2)
            self.wave = nn.Conv1d(16, 32, 3, padding=1)
            self.first = nn.Linear(32, 64)
            self.second = nn.Linear(64, 32, bias=False)
            self.scale = nn.Parameter(torch.rand(64) + 0.5)
            self.words = nn.Embedding(40, 32)

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = functional.relu6(self.depthwise(functional.relu(self.stem(x))))
            x = self.pointwise(x)
            x = self.wave(self.up(x + self.grouped(x)).flatten(2)).transpose(1, 2)
            # The product would be folded into the weight by a converter that sees the weight.
            x = self.second(self.first(x) * self.scale)
            return x, functional.linear(self.words(ids), self.words.weight)

    torch.manual_seed(0)
    model = Layers()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    inputs = [TensorSpec("x", "f32", (1, 3, 16, 16)), TensorSpec("ids", "i64", (1, 5), low=0, high=39)]
    examples = [torch.randn(1, 3, 16, 16), torch.tensor([[3, 1, 39, 0, 7]])]
    return make_program(model, inputs, examples, output_names=["image", "text"])


@pytest.fixture(scope="session")
def with_encoded() -> Callable[[TorchProgram, dict[str, EncodedTensor]], TorchProgram]:
    """A program with the given weights decided."""

    def encode(program: TorchProgram, encoded: dict[str, EncodedTensor]) -> TorchProgram:
        encodings = {name: tensor.encoding for name, tensor in encoded.items()}
        record = dataclasses.replace(program.record, encodings=encodings)
        return dataclasses.replace(program, encoded=encoded, record=record)

    return encode


@pytest.fixture(scope="session")
def lower_to_tflite(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TFLiteModel]:
    """Save a program and lower it, each program once: ``lower(program, activations="float")``."""
    from edgeship.passes.lower.torch_to_tflite import TorchToTFLite

    made: dict[tuple[int, str], tuple[TorchProgram, TFLiteModel]] = {}

    def lower(program: TorchProgram, activations: str = "float", folder: Path | None = None) -> TFLiteModel:
        key = (id(program), activations)
        if folder is None and key in made:
            return made[key][1]
        base = tmp_path_factory.mktemp("tflite")
        program.save(base / "program")
        folder = folder or base / "out"
        folder.mkdir(exist_ok=True)
        model = TorchModel(base / "program", program.signature)
        step = TorchToTFLite(activations=activations)  # type: ignore[arg-type]
        artifact = step.run(model, Context(folder))
        step.ensures(artifact, model=model)
        made.setdefault(key, (program, artifact))
        return artifact

    return lower


@pytest.fixture(scope="session")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Save a program and lower it: ``lower(program, step)`` returns the artifact, whose folder stays for the session."""

    def run(program: TorchProgram, step: Any, folder: Path | None = None) -> Any:
        base = tmp_path_factory.mktemp("lowered")
        program.save(base / "program")
        folder = folder or base / "out"
        folder.mkdir(exist_ok=True)
        model = TorchModel(base / "program", program.signature)
        artifact = step.run(model, Context(folder))
        step.ensures(artifact, model=model)
        return artifact

    return run


@pytest.fixture(scope="session")
def lower_to_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxModel]:
    """Save a program and lower it, each program once: ``lower(program, activations="float")``."""
    from edgeship.passes.lower.torch_to_onnx import TorchToOnnx

    made: dict[tuple[int, str], tuple[TorchProgram, OnnxModel]] = {}

    def lower(program: TorchProgram, activations: str = "float", folder: Path | None = None) -> OnnxModel:
        key = (id(program), activations)
        if folder is None and key in made:
            return made[key][1]
        base = tmp_path_factory.mktemp("onnx")
        program.save(base / "program")
        folder = folder or base / "out"
        folder.mkdir(exist_ok=True)
        model = TorchModel(base / "program", program.signature)
        step = TorchToOnnx(activations=activations)  # type: ignore[arg-type]
        artifact = step.run(model, Context(folder))
        step.ensures(artifact, model=model)
        made.setdefault(key, (program, artifact))
        return artifact

    return lower


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random language model by its family; each is written once."""
    folder = tmp_path_factory.mktemp("families")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import families

    def make(name: str) -> Path:
        made = folder / name
        return made if made.is_dir() else families.make_family(name, made)

    return make


@pytest.fixture(scope="session")
def decoder_model(
    family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TorchModel]:
    """A family's program as the loader leaves it, texts of 32 tokens; each is loaded once."""
    from edgeship.frontends.decoder import load_decoder

    folder = tmp_path_factory.mktemp("decoders")
    made: dict[str, TorchModel] = {}

    def load(name: str) -> TorchModel:
        if name not in made:
            program = load_decoder(family(name), 32).program
            program.save(folder / name)
            made[name] = TorchModel(folder / name, program.signature)
        return made[name]

    return load


@pytest.fixture(scope="session")
def encoded_model() -> Callable[[TorchModel, str, Path], TorchModel]:
    """``encoded_model(model, "int4-g32", folder)``: a decoder with its linear layers and tables in one encoding."""
    from edgeship.compression.encode import Encoder
    from edgeship.core.encodings import encoding_named, fitted
    from edgeship.program.program import TorchProgram

    def encode(model: TorchModel, name: str, folder: Path) -> TorchModel:
        program = TorchProgram.open(model)
        wanted = {
            use.name: fitted(encoding_named(name), use)
            for use in program.record.inventory.weights
            if use.op in ("linear", "embedding") and use.name not in program.record.aliases
        }
        encoded, _ = Encoder(program, wanted).encode()
        encodings = {key: tensor.encoding for key, tensor in encoded.items()}
        record = dataclasses.replace(program.record, encodings=encodings)
        dataclasses.replace(program, encoded=encoded, record=record).save(folder / "program")
        return TorchModel(folder / "program", model.signature)

    return encode


@pytest.fixture(scope="session")
def continued(family: Callable[[str], Path]) -> Callable[[str], tuple[list[int], list[int]]]:
    """A prompt of 20 tokens and the 32 that transformers itself writes after it, by its own attention and cache."""
    import torch
    import transformers

    def write(name: str) -> tuple[list[int], list[int]]:
        from edgeship.compat import openelm

        openelm.register()
        model = transformers.AutoModelForCausalLM.from_pretrained(family(name), dtype=torch.float32).eval()
        prompt = torch.randint(2, 256, (1, 20), generator=torch.Generator().manual_seed(1))
        written = model.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        return prompt[0].tolist(), written[0, 20:].tolist()

    return write


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """Chat templates by name, each in a manner that many models have."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests" / "templates").iterdir())}


@pytest.fixture(scope="session")
def storyteller(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """samples/storyteller in 4 bits for onnxruntime-genai, and what the build said. Tests carry
    ``xdist_group("storyteller")``."""
    folder = tmp_path_factory.mktemp("story")
    text = folder / "text.txt"
    lines = [f"ROMEO:\nThe {'very ' * (i % 7)}crown of my lord number {i} is not mine.\n\n" for i in range(60)]
    text.write_text("".join(lines), encoding="utf-8")
    ran = call_cli(
        "build", ROOT / "samples" / "storyteller", "--target", "linux-x86", "--runtime", "onnx", "--profile", "small",
        "--context", "256", "--eval", text, "--max-drop", "30%", "-o", folder / "b",
        "--set", "check/accuracy.limit=4", "--set", "check/layers.samples=2",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return folder / "b", ran
