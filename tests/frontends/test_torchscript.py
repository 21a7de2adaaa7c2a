"""TorchScript archives, scripted, traced and frozen, against torch's own interpreter; and what must not happen."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.data.specs import split_inputs
from edgeship.engine.sources import find_source
from edgeship.errors import EdgeshipError, LimitError, SourceError, UnsupportedOpError, UsageError
from edgeship.frontends.torchscript.module import Scripted, arguments_of, split_arguments
from edgeship.frontends.torchscript.script import read_script
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.more = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=2) for _ in range(2)])
        self.up, self.grow = nn.Upsample(scale_factor=2.0, mode="bilinear"), nn.ConvTranspose2d(8, 8, 2, 2)
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        for layer in self.more:
            x = x + F.silu(layer(x))
        x = F.max_pool2d(self.grow(self.up(x)), 2)
        x = F.adaptive_avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 1).flatten(1)
        return torch.softmax(self.head(self.drop(x)), -1)


class Voice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, (hidden, _) = self.layer(x)
        return self.head(y[:, -1]), hidden


class Shift(nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
        return x * (n << 3) + (n >> 1)


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
        falling, rising = [1, n, 2], [3, n, 1]
        falling.sort(reverse=True)
        rising.sort()
        return x * falling[0] + rising[0]


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
        return (x > 0).long() + round(n * 0.5)


class Counted(nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
        return (x > 0).long() * torch.scalar_tensor(n) + torch.scalar_tensor(n, dtype=torch.int32)


class Power(nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
        return (x > 0).long() * 2**n + n**2


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rounds = nn.Linear(4, 4), nn.Linear(4, 4), 3

    def forward(
        self, x: torch.Tensor, sr: int, flag: bool = True, added: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        if sr == 16000:
            y = self.a(x)
        elif sr % 16000 == 0:
            y = self.a(x) * 2
        else:
            y = self.b(x)
        parts: list[torch.Tensor] = []
        for place in range(self.rounds):
            parts.append(y * place)
        if added is not None:
            y = y + added
        count = 0
        while count < 3:
            y = y + 1
            count += 1
        if x.size(0) > 1 and flag:
            y = torch.cat(parts, 1)
        stacked = torch.stack(parts)
        stacked[0] = 1.0
        return {"y": y, "z": stacked.sum(0)}


class Found(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor


class Fields(nn.Module):
    def forward(self, x: torch.Tensor) -> Found:
        return Found(x * 2, x.sum(-1))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.full((1, 4), 0.5))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = torch.tanh(self.layer(x) + self.state)
        return self.state


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 1:3] = 0
        y[:, 0].add_(5)
        return y.relu_().mul_(2)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x)[0]


MODULES: Mapping[str, tuple[type[nn.Module], Sequence[str]]] = {
    "picture": (Picture, ["x:f32[1,3,8,8]"]),
    "voice": (Voice, ["x:f32[1,6,5]"]),
    "fields": (Fields, ["x:f32[2,5]"]),
    "remembers": (Remembers, ["x:f32[1,4]"]),
    "in place": (InPlace, ["x:f32[2,4]"]),
    "attends": (Attends, ["x:f32[1,5,16]"]),
    "a choice, 16 kHz": (Choice, ["x:f32[2,4]", "sr=16000"]),
    "a choice, 48 kHz": (Choice, ["x:f32[2,4]", "sr=48000", "flag=false"]),
    "a choice, 8 kHz, two tensors": (Choice, ["x:f32[1,4]", "sr=8000", "flag=true", "added:f32[1,4]"]),
}


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [leaf for item in items for leaf in leaves(item)]


def archive(folder: Path, module: nn.Module, form: str, examples: Sequence[torch.Tensor]) -> Path:
    made = torch.jit.trace(module, tuple(examples)) if form == "traced" else torch.jit.script(module)
    made = torch.jit.freeze(made) if form == "frozen" else made
    torch.jit.save(made, folder / "m.pt")
    return folder / "m.pt"


def program_of(path: Path, texts: Sequence[str]) -> tuple[TorchProgram, Scripted, list[TensorSpec]]:
    script = read_script(path)
    taken, chosen = split_arguments(script, *split_inputs(texts))
    made = Scripted(script, [spec.name for spec in taken], chosen)
    examples = [torch.randn(spec.shape) for spec in taken]
    return make_program(made.module, taken, examples, call=made.call), made, taken


@pytest.mark.parametrize("form", ["scripted", "traced", "frozen"])
@pytest.mark.parametrize("name", MODULES)
def test_an_archive_answers_as_torch_does(tmp_path: Path, name: str, form: str) -> None:
    kind, texts = MODULES[name]
    if form == "traced" and kind in (Choice, Attends):
        pytest.skip("torch does not trace it the same twice, or it takes numbers")
    torch.manual_seed(0)
    module = kind().eval()
    specs, fixed = split_inputs(texts)
    path = archive(tmp_path, module, form, [torch.randn(spec.shape) for spec in specs])
    given = {item.name: item.values for item in fixed}
    original = torch.jit.load(path)
    own = [item.name for item in arguments_of(read_script(path))]
    if form == "traced":
        texts = [f"{name}:{text.partition(':')[2]}" for name, text in zip(own, texts, strict=False)]
    program, made, taken = program_of(path, texts)
    tensors = {spec.name: torch.randn(spec.shape) for spec in taken}
    with torch.no_grad():
        wanted = leaves(original(**{**tensors, **given}))
        found = program.module()(*(tensors[spec.name] for spec in taken))
    for want, have in zip(wanted, found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert list(made.assigned) == (["state"] if kind is Remembers and form != "traced" else [])


def test_outputs_and_weights_keep_their_names(tmp_path: Path) -> None:
    path = archive(tmp_path, Choice().eval(), "scripted", [])
    program, _, _ = program_of(path, ["x:f32[2,4]", "sr=16000"])
    assert [spec.name for spec in program.signature.outputs] == ["y", "z"]
    assert {"a.weight", "a.bias"} <= set(program.weights)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x:f32[2,4]"], r"size or value of its input sr \(int\); add --input sr=VALUE"),
        (["x:f32[2,4]", "sr=0.5"], "input sr of m.pt is of type int, its value 0.5 is not"),
        (["x:f32[2,4]", "sr:i64[1]"], "is of type int, no tensor; fix its value: --input sr=VALUE"),
        (["y:f32[2,4]", "sr=1"], "has no input y; it takes x, sr, flag, added"),
        (["sr=16000"], r"its input x \(Tensor\); add --input x:f32"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(tmp_path: Path, texts: Sequence[str], words: str) -> None:
    path = archive(tmp_path, Choice().eval(), "scripted", [])
    with pytest.raises(UsageError) as caught:
        program_of(path, texts)
    assert words.replace("\\", "") in str(caught.value)


@pytest.mark.parametrize("n", [5, 7, -3])
@pytest.mark.parametrize(
    "module", [Shift(), Sorted(), Rounded(), Counted(), Power()], ids=lambda module: type(module).__name__
)
def test_numbers_are_worked_out_as_torch_does(tmp_path: Path, module: nn.Module, n: int) -> None:
    path = archive(tmp_path, module, "scripted", [])
    program, _, _ = program_of(path, ["x:f32[2,4]", f"n={n}"])
    x = torch.randn(2, 4)
    found, wanted = program.module()(x)[0], torch.jit.script(module)(x, n)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = (x.shape[1] * 3 - 2) // 2 % 4
        return x[:, : x.shape[1] // 2].reshape(x.shape[0], 2, x.shape[1] // 4) * part


def test_sizes_that_a_trace_computes_are_numbers(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    program, _, _ = program_of(archive(tmp_path, Half(), "traced", [x]), ["x:f32[2,8]"])
    assert torch.equal(program.module()(x)[0], Half()(x))


def test_a_model_without_inputs_that_fails_names_none(tmp_path: Path) -> None:
    path = archive(tmp_path, Choice().eval(), "scripted", [])
    with pytest.raises(SourceError, match=r"^the model does not run: "):
        program_of(path, ["x=3", "sr=16000"])


def test_a_branch_on_values_is_refused(tmp_path: Path) -> None:
    class OnValues(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x + 1
            return x - 1

    path = archive(tmp_path, OnValues(), "scripted", [])
    with pytest.raises(SourceError, match=r"could not trace|only a run tells"):
        program_of(path, ["x:f32[2,4]"])


def rewritten(path: Path, body: str) -> Path:
    """The archive with another body of ``forward``."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    (source,) = [name for name in entries if name.endswith(".py")]
    head = entries[source].decode().partition("    return")[0]
    entries[source] = (head + "".join(f"    {line}\n" for line in body.splitlines())).encode()
    with zipfile.ZipFile(path.with_name("changed.pt"), "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)
    return path.with_name("changed.pt")


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


HOSTILE = {
    "a builtin": "return open('canary', 'w')",
    "an import": "import os\nreturn x",
    "a dunder": "return x.__class__.__mro__",
    "a function by attribute": "return torch._C._jit_set_profiling_executor(True)",
    "a file": "torch.save(x, 'canary')\nreturn x",
    "a file that is mapped": "return torch.from_file('canary', True, 10)",
    "another namespace": "return ops.os.system('touch canary')",
    "a comprehension": "return [y for y in (1, 2)]",
    "a lambda": "return (lambda: x)()",
    "a class": "class A: pass\nreturn x",
    "getattr": "return getattr(x, '__class__')",
    "eval": "return eval('1')",
    "a number without end": "y = torch.pow(10, 100000000)\nreturn x",
    "products without end": "y = 9\nfor i in range(100000):\n  y = torch.mul(y, y)\nreturn x",
    "a list without end": "y = torch.mul([0], 100000000000)\nreturn x",
    "a loop without end": "y = 0\nwhile True:\n  y = 1\nreturn x",
    "a call of itself": "return (self).forward(x, )",
    "what nothing sets": "return y",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_of_the_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = rewritten(archive(tmp_path, Plain(), "scripted", []), HOSTILE[name])
    monkeypatch.setattr("edgeship.frontends.torchscript.run.MAX_STEPS", 300_000)
    with pytest.raises((SourceError, UnsupportedOpError, LimitError)) as caught:
        program_of(path, ["x:f32[2,4]"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_the_change_of_the_archive_is_read(tmp_path: Path) -> None:
    """The oracle of the test above: a harmless body in the same place is run."""
    path = rewritten(archive(tmp_path, Plain(), "scripted", []), "return torch.mul(x, 3)")
    program, _, _ = program_of(path, ["x:f32[2,4]"])
    x = torch.randn(2, 4)
    assert torch.equal(program.module()(x)[0], 3 * x)


def test_a_file_cut_anywhere_ends_in_a_reason(tmp_path: Path) -> None:
    path = archive(tmp_path, Choice().eval(), "scripted", [])
    content = path.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 20)):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(EdgeshipError):
            read_script(tmp_path / "cut.pt")


@pytest.mark.parametrize("name", ["m.pt", "m.jit", "m.torchscript", "m.anything"])
def test_an_archive_is_known_by_what_it_holds(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path, Plain(), "scripted", []).rename(tmp_path / name)
    assert find_source(str(path), inputs=("x:f32[2,4]",)).source.form == "torchscript"


def test_what_is_quantized_by_torch_is_refused(tmp_path: Path) -> None:
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval(), {nn.Linear})
    path = archive(tmp_path, module, "scripted", [])
    with pytest.raises((SourceError, UnsupportedOpError), match=r"m\.pt"):
        program_of(path, ["input:f32[2,4]"])
