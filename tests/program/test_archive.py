"""A .pt2 of others is read without running anything in it, and answers as it does through torch's own loader."""

from __future__ import annotations

import contextlib
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeship.errors import SourceError, UnsafeSourceError
from edgeship.program.archive import code_in_archive, read_archive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import IDLE, PT2, changed_pt2, good_pt2, graph_of, payload_of


class Everything(nn.Module):
    """Parameters, buffers of both kinds, an expanded buffer, tied weights, a constant, nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.full((1,), 2.0).expand(4, 1, 1))
        self.register_buffer("shift", torch.ones(1), persistent=False)
        self.table = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight
        self.rnn = nn.LSTM(4, 4)

    def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, list[torch.Tensor]], *, ids: torch.Tensor) -> Any:
        features = self.norm(self.conv(x)) * self.scale + self.shift + pair[0] + torch.tensor([0.5])
        scores = self.out(self.table(ids)) + pair[1][0]
        return {"features": features, "rest": (scores, self.rnn(features.mean((2, 3))[None])[0])}


def inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    return (x, (torch.ones(1), [torch.ones(1)])), {"ids": torch.tensor([[1, 6]])}


def test_it_answers_as_through_torchs_own_loader(tmp_path):
    torch.manual_seed(0)
    args, kwargs = inputs()
    model = Everything().eval()
    torch.export.save(torch.export.export(model, args, kwargs), tmp_path / "m.pt2")
    ours, torchs = read_archive(tmp_path / "m.pt2"), torch.export.load(tmp_path / "m.pt2")
    assert ours.graph_module.code == torchs.graph_module.code
    assert ours.state_dict.keys() == torchs.state_dict.keys()
    for name, value in torchs.state_dict.items():
        assert torch.equal(ours.state_dict[name], value)
        assert ours.state_dict[name].dtype == value.dtype
        assert isinstance(ours.state_dict[name], nn.Parameter) == isinstance(value, nn.Parameter)
    same = ours.state_dict["out.weight"].data_ptr() == ours.state_dict["table.weight"].data_ptr()
    assert same, "tied weights share their memory"
    found, wanted = (program.module()(*args, **kwargs) for program in (ours, torchs))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(ours.example_inputs, (args, kwargs), rtol=0, atol=0)


def test_branches_and_switches_inside_a_graph(tmp_path):
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))
            return y * 2

    torch.export.save(torch.export.export(Branch(), (torch.ones(3),)), tmp_path / "m.pt2")
    program = read_archive(tmp_path / "m.pt2")
    for x in (torch.ones(3), -torch.ones(3)):
        torch.testing.assert_close(program.module()(x), Branch()(x))


def test_a_result_of_a_class_that_nobody_registered_is_its_leaves(tmp_path):
    from torch.utils import _pytree

    Pair = type("Pair", (), {"__init__": lambda self, a, b: setattr(self, "both", (a, b))})
    _pytree.register_pytree_node(
        Pair, lambda pair: (list(pair.both), None), lambda items, _: Pair(*items), serialized_type_name="tests.Pair"
    )

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Pair(x + 1, x + 2)

    torch.export.save(torch.export.export(Two(), (torch.ones(2),)), tmp_path / "m.pt2")
    one, two = read_archive(tmp_path / "m.pt2").module()(torch.ones(2))
    assert one[0] == 2
    assert two[0] == 3


@pytest.mark.parametrize("name", PT2)
def test_nothing_runs(tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(tmp_path)
    path = changed_pt2(tmp_path / "m.pt2", PT2[name], tmp_path / "canary")
    with pytest.raises(SourceError) as raised:
        read_archive(path)
    assert raised.value.fix
    assert not (tmp_path / "canary").exists()
    assert code_in_archive(path) or not isinstance(raised.value, UnsafeSourceError)
    assert not (tmp_path / "canary").exists()


def test_torch_itself_would_have_run_most_of_them(tmp_path, monkeypatch):
    """The files are as hostile as they look: else the test above shows nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    ran = set()
    for index, name in enumerate(PT2):
        canary = tmp_path / f"canary-{index}"
        path = changed_pt2(tmp_path / "m.pt2", PT2[name], canary)
        with contextlib.suppress(BaseException):  # whatever hostile files raise
            torch.export.load(path).module()(torch.ones(1, 4))
        if canary.exists():
            ran.add(name)
    assert {"pickled sample inputs", "a pickled weight", "a size to be evaluated"} <= ran
    # torch 2.9 loads no opaque objects.
    assert "an opaque object" in ran or torch.__version__.startswith("2.9.")
    assert len(ran) >= 8, ran


@pytest.mark.parametrize("name", IDLE)
def test_what_is_not_needed_is_not_read(tmp_path, name):
    path = changed_pt2(tmp_path / "m.pt2", IDLE[name], tmp_path / "canary")
    assert read_archive(path).module()(torch.ones(1, 4)).shape == (1, 3)
    assert not (tmp_path / "canary").exists()


def _tensor_of(entries: dict[str, bytes], **changes: Any) -> None:
    payload_of(entries, "weights", lambda table: table["weight"]["tensor_meta"].update(changes))


Broken = Callable[[dict[str, bytes]], object]
BROKEN: dict[str, Broken] = {
    "more numbers than bytes": lambda e: _tensor_of(e, sizes=[{"as_int": 10**9}, {"as_int": 4}]),
    "more numbers than there can be": lambda e: _tensor_of(e, sizes=[{"as_int": 2**62}, {"as_int": 2**62}]),
    "expanded without end": lambda e: _tensor_of(
        e, sizes=[{"as_int": 10**6}, {"as_int": 10**6}], strides=[{"as_int": 0}, {"as_int": 0}]
    ),
    "a negative size": lambda e: _tensor_of(e, sizes=[{"as_int": -1}, {"as_int": 4}]),
    "a negative stride": lambda e: _tensor_of(e, strides=[{"as_int": -1}, {"as_int": 1}]),
    "an offset outside": lambda e: _tensor_of(e, storage_offset={"as_int": 2**40}),
    "a size that is a text": lambda e: _tensor_of(e, sizes=[{"as_int": "3"}, {"as_int": 4}]),
    "no such dtype": lambda e: _tensor_of(e, dtype=99),
    "no weights": lambda e: e.pop("data/weights/weight_0"),
    "no table": lambda e: e.pop("data/weights/model_weights_config.json"),
    "no graph": lambda e: e.pop("models/model.json"),
    "no format": lambda e: e.pop("archive_format"),
    "a graph that is no JSON": lambda e: e.update({"models/model.json": b"{"}),
    "a graph that is a list": lambda e: e.update({"models/model.json": b"[]"}),
    "a graph that is nested": lambda e: e.update({"models/model.json": b"[" * 200_000}),
    "a graph without nodes": lambda e: graph_of(e, lambda d: d["graph_module"]["graph"].pop("nodes")),
    "a node without inputs": lambda e: graph_of(e, lambda d: d["graph_module"]["graph"]["nodes"][0]["inputs"].clear()),
    "an operator that is not there": lambda e: graph_of(
        e, lambda d: d["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.linear.nothing")
    ),
    "two forms of one value": lambda e: graph_of(
        e, lambda d: d["graph_module"]["graph"]["outputs"].append({"as_int": 1, "as_float": 1.0})
    ),
    "another version": lambda e: graph_of(e, lambda d: d["schema_version"].update(major=99)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_ends_in_a_reason(tmp_path, name):
    path = changed_pt2(tmp_path / "m.pt2", lambda entries, _: BROKEN[name](entries) and None, tmp_path / "canary")
    with pytest.raises(SourceError) as raised:
        read_archive(path)
    assert raised.value.fix
    assert len(str(raised.value)) < 500


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    good = good_pt2(tmp_path / "good.pt2")
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(SourceError, match="compressed"):
        read_archive(tmp_path / "m.pt2")


def test_sizes_that_are_expressions_are_dynamic(tmp_path):
    rows = torch.export.Dim("rows", min=2, max=8)
    program = torch.export.export(nn.Linear(4, 3), (torch.ones(3, 4),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(SourceError, match=r"with the dynamic size s\d+"):
        read_archive(tmp_path / "m.pt2")


def test_the_list_of_what_would_run_names_it(tmp_path):
    path = changed_pt2(tmp_path / "m.pt2", PT2["pickled sample inputs"], tmp_path / "canary")
    assert any("posix.system" in line for line in code_in_archive(path))
    assert code_in_archive(good_pt2(tmp_path / "g.pt2")) == []


def test_a_program_of_our_own_is_read_without_pickles(tmp_path, monkeypatch):
    """The normal form is saved by torch and read by us: torch's loader and its unpickler are not asked."""
    from edgeship.core.model import TensorSpec, TorchModel
    from edgeship.program.export import make_program
    from edgeship.program.program import TorchProgram

    program = make_program(nn.Linear(4, 3), [TensorSpec("x", "f32", (1, 4))], [torch.ones(1, 4)])
    program.save(tmp_path / "program")
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.export, "load", None)
    opened = TorchProgram.open(TorchModel(tmp_path / "program", program.signature))
    x = torch.randn(1, 4)
    torch.testing.assert_close(opened.module()(x), program.module()(x))
    assert json.loads((tmp_path / "program" / "program.json").read_text())["signature"]["inputs"][0]["name"] == "x"
