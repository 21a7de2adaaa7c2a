"""Every allowed cell (runtime, operator, encoding, activations) twice: read back bit for bit, and run against torch.

The cells and the check are those of ``benchmarks/encoding_matrix.py``, which writes docs/results/encodings.md.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch

from edgeship.core.encodings import Encoding, families
from edgeship.core.forms import Form, Forms, Lacks
from edgeship.core.inventory import Inventory, WeightOp, WeightUse
from edgeship.core.model import Signature, Source
from edgeship.core.planning import refuse_unholdable
from edgeship.core.profile import Choice, DataRef, Profile, Request
from edgeship.core.registry import runtimes, targets
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import Affine, Float, Palette, Sparse, same_numbers
from edgeship.errors import EncodingError

MODES = get_args(ActivationMode)
ROOT = Path(__file__).resolve().parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("encoding_matrix", ROOT / "benchmarks" / "encoding_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cells = _script()
# Engines of language models hold what their family holds, and are given decoders instead of layers.
NAMES = sorted(name for name, runtime in runtimes().items() if not runtime.engine.for_language)
# One batch of each kind of arithmetic a runtime has; the compiler for Hexagon takes seconds, and starts once.
QUICK = [
    pytest.param(name, mode, id=f"{name}-{mode}")
    for name in NAMES
    for mode in cells.batches(cells.cells(name, quick=True), together=True)
    if (name, mode) not in (("qnn", "float"), ("qnn", "int8"), ("onnx", "int16"), ("tflite", "int16"))
]
ALL = [
    pytest.param(name, key, marks=pytest.mark.heavy, id=f"{name}-{key.replace(' ', '-')}")
    for name in NAMES
    for key in cells.batches(cells.cells(name))
]


def _assert_exact(batch) -> None:
    outcomes = cells.check(batch)
    assert outcomes.keys() == set(batch)
    wrong = [f"{cell}: {outcome.problem}" for cell, outcome in outcomes.items() if outcome.problem]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("name", "mode"), QUICK)
def test_representative_cells_are_exact(name, mode):
    _assert_exact(cells.batches(cells.cells(name, quick=True), together=True)[mode])


@pytest.mark.parametrize(("name", "key"), ALL)
def test_every_cell_is_exact(name, key):
    _assert_exact(cells.batches(cells.cells(name))[key])


@pytest.mark.parametrize("name", NAMES)
def test_planning_refuses_what_is_not_held_and_says_why(name):
    """Every refused cell, through the question that planning asks."""
    runtime = runtimes()[name]
    refused = [cell for cell in cells.cells(name) if cell.refused]
    assert refused
    for cell in refused:
        use = WeightUse("layer.weight", cell.layer.op, (8, 8))
        request = Request(
            source=Source(Path("model.py"), Signature((), ())),
            target=next(iter(targets().values())),
            runtime=name,
            profile=Profile("ours", "", Choice(activations=cell.activations)),
            inventory=Inventory((use,), (), 0),
            calibration=DataRef("data.npz", "0"),
        )
        with pytest.raises(EncodingError) as caught:
            refuse_unholdable(request, lambda use, encoding=cell.encoding: encoding)
        for part in (runtime.title, str(cell.encoding), cell.refused, "layer.weight"):
            assert part in str(caught.value)


@dataclass(frozen=True)
class Strange(Encoding):
    """A family of which no runtime has heard."""

    kind = "strange"
    bits: int = 4

    @classmethod
    def named(cls, text):
        return None

    @property
    def short_name(self):
        return "strange"

    def __str__(self):
        return "strange"

    def rebuild(self, arrays):
        raise AssertionError


@dataclass(frozen=True)
class Disguised(Strange):
    """Another one, whose numbers integers hold too."""

    kind = "disguised"

    @property
    def stored_as(self):
        return Affine(4)


@pytest.mark.parametrize("name", sorted(runtimes()))
def test_a_family_that_nobody_knows_is_refused_by_every_runtime(name):
    runtime = runtimes()[name]
    for op in get_args(WeightOp):
        for mode in MODES:
            assert "strange" in runtime.holds(op, Strange(), mode) or runtime.refuses(op, mode)


@pytest.mark.parametrize("name", sorted(runtimes()))
def test_a_family_that_integers_hold_is_held_where_they_are(name):
    runtime = runtimes()[name]
    for op in get_args(WeightOp):
        for mode in MODES:
            reason = runtime.holds(op, Disguised(), mode)
            assert (reason == "") == (runtime.holds(op, Affine(4), mode) == "")
            assert reason == "" or "int4 per channel" in reason or runtime.refuses(op, mode)
            assert runtime.resident_bits(op, Disguised(), mode) == runtime.resident_bits(op, Affine(4), mode)


@pytest.mark.parametrize("name", sorted(runtimes()))
def test_the_table_of_a_runtime_has_a_row_for_each_family_and_no_other(name):
    """A new family is not forgotten: each format says how it stores it, or why not."""
    rows = list(runtimes()[name].forms)
    assert len(rows) == len({row.family for row in rows})
    assert {row.family for row in rows} == set(families().values())
    assert all(row.how if isinstance(row, Form) else row.reason for row in rows)


def test_a_table_with_another_row_for_a_family_has_that_one_alone():
    class Integers(Form[Affine]):
        family, how = Affine, "somehow"

    table = Forms((Lacks(Float, "no"), Lacks(Affine, "no"))).replaced(Integers())
    assert table.refusal("linear", Affine(4), "float") == ""
    assert table.refusal("linear", Float(16), "float") == "no"
    assert len(list(table)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_it_holds_is_not_nothing(name):
    allowed = cells.batches(cells.cells(name))
    assert sum(map(len, allowed.values())) >= 60
    kinds = {cell.encoding.kind for batch in allowed.values() for cell in batch}
    assert {"float", "affine"} <= kinds


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_the_check_sees_one_wrong_integer(name, monkeypatch):
    """A check that cannot fail proves nothing: one integer of one weight is stored otherwise than decided."""
    batch = [
        cell for cell in cells.cells(name) if cell.activations == "float" and str(cell.encoding) == "int4 per channel"
    ]
    batch = [cell for cell in batch if cell.layer.name in ("linear", "conv") and not cell.refused]
    assert len(batch) == 2
    lower = cells.lower

    def wrong(program, *arguments):
        tensor = program.encoded["layers.0.weight"]
        values = tensor.values.copy()
        values.reshape(-1)[np.argmax(values)] -= 3
        changed = {**program.encoded, "layers.0.weight": replace(tensor, values=values)}
        return lower(replace(program, encoded=changed), *arguments)

    monkeypatch.setattr(cells, "lower", wrong)
    outcomes = cells.check(batch)
    assert "1 of" in outcomes[batch[0]].problem
    assert outcomes[batch[0]].snr_db < 60
    assert outcomes[batch[1]].problem == ""


@pytest.mark.parametrize("encoding", [Float(16), Affine(4), Palette(4, 8), *(Sparse(inner) for inner in (Float(16), Affine(8), Palette(4)))], ids=str)  # fmt: skip
def test_the_plain_encoders_say_what_they_encode(encoding):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    tensor = cells.encode(weight, encoding, 0)
    assert tensor.encoding == encoding
    assert same_numbers(tensor, tensor) == ""
    kept = np.ones(weight.shape, bool) if not isinstance(encoding, Sparse) else tensor.mask
    assert np.abs(tensor.dequantize() - weight.numpy())[kept].max() < 1
