"""What edgeship needs of Core AI's packages that they do not document: an upgrade that breaks it is red here and says
what."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("coreai_torch")

from edgeship.compat import coreai as compat

aten = torch.ops.aten


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return torch.relu(x) * self.weight


class Watched(compat.Converter):
    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def begin(self, name, **options):
        self.steps.append(("begin", name))
        return super().begin(name, **options)

    def placeholder(self, node) -> None:
        self.steps.append(("placeholder", node.op))
        if "weight" in node.name:
            self.bind(node, compat.dialect.constant(np.full(3, 5.0, np.float32)))
        else:
            super().placeholder(node)

    def call(self, node) -> None:
        self.steps.append(("call", str(node.target)))
        super().call(node)


def converted():
    converter = Watched()
    exported = torch.export.export(Net().eval(), (torch.ones(3),)).run_decompositions({})
    converter.add_exported_program(exported, input_names=["x"], output_names=["y"], entrypoint_name="main")
    return converter, converter.to_coreai()


def walk(operation):
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from walk(inner.operation)


def test_steps_of_the_converter_may_be_taken_over() -> None:
    converter, program = converted()
    assert converter.steps[0] == ("begin", "main")
    assert ("placeholder", "placeholder") in converter.steps
    assert {target for step, target in converter.steps if step == "call"} == {"aten.relu.default", "aten.mul.Tensor"}
    found = list(walk(compat.module_of(program).operation))
    constants = [item for item in found if item.name == "coreai.constant"]
    assert any("5.0" in str(item.attributes["value"]) for item in constants)
    assert not any("2.0" in str(item.attributes["value"]) for item in constants)


@pytest.mark.parametrize(("key", "known"), [("add.Tensor", True), ("relu.default", True), ("no_such.default", False)])
def test_the_converter_says_what_it_lowers(key, known) -> None:
    assert compat.knows_aten(key) is known


def test_operations_are_made_named_and_exchanged_in_place() -> None:
    _, program = converted()
    module = compat.module_of(program)
    old = next(item for item in walk(module.operation) if item.name == "coreai.relu")
    kinds, operands = [result.type for result in old.results], list(old.operands)
    with module.context, compat.InsertionPoint(old):
        place = compat.Location.from_attr(compat.Attribute.parse('loc("activation x":0:0)'))
        new = compat.Operation.create(old.name, kinds, operands, loc=place)
        new.attributes["note"] = compat.StringAttr.get("there")
    old.results[0].replace_all_uses_with(new.results[0])
    old.erase()
    (again,) = [item for item in walk(module.operation) if item.name == "coreai.relu"]
    assert str(again.location) == 'loc("activation x":0:0)'
    assert compat.StringAttr(again.attributes["note"]).value == "there"


def test_numbers_in_the_program_are_read_back() -> None:
    _, program = converted()
    for item in walk(compat.module_of(program).operation):
        if item.name == "coreai.constant" and compat.DenseElementsAttr.isinstance(item.attributes["value"]):
            value = compat.DenseElementsAttr(item.attributes["value"])
            if "5.0" in str(value):
                assert value.is_splat
                assert np.array(value).tolist() == [5.0] * 3
                return
    raise AssertionError("no constant is written in the program itself")


def test_large_constants_are_resources_with_a_name() -> None:
    _, program = converted()
    context = compat.module_of(program).context
    with context, compat.Location.unknown(context):
        kind = compat.RankedTensorType.get([4], compat.F32Type.get())
        held = compat.DenseResourceElementsAttr.get_from_buffer(memoryview(np.ones(4, np.float32)), "weight", kind)
        assert compat.DenseResourceElementsAttr.isinstance(held)
        assert not compat.DenseElementsAttr.isinstance(held)
        assert str(held).startswith("dense_resource<weight")
        assert str(compat.F16Type.get()) == "f16"
        assert str(compat.IntegerType.get_signed(8)) == "si8"
        assert kind.element_type == compat.F32Type.get()


@pytest.mark.parametrize(
    "name",
    [
        "constant", "ConstantOp", "quantize", "dequantize", "cast", "blockwise_shift_scale", "lut_to_dense",
        "build_sparse_with_bitmask", "lut_to_sparse_with_bitmask", "sparse_with_bitmask_to_dense",
    ],
)  # fmt: skip
def test_the_dialect_has_the_operations_that_hold_weights(name) -> None:
    assert callable(getattr(compat.dialect, name))


def test_the_types_of_mxfp4_are_spelled_as_files_are_read():
    with compat.ir.Context(), compat.Location.unknown():
        assert str(compat.Float4E2M1FNType.get()) == "f4E2M1FN"
        assert str(compat.Float8E8M0FNUType.get()) == "f8E8M0FNU"
        assert float(compat.FloatAttr.get(compat.Float4E2M1FNType.get(), 1.5).value) == 1.5


def test_names_that_the_library_draws_are_numbered_inside_and_drawn_outside() -> None:
    from coreai.authoring import func, graph_builder

    for module in (func, graph_builder):
        assert module._randomize_fn_name("f") != module._randomize_fn_name("f")
    for _ in range(2):
        with compat.numbered_names():
            names = [func._randomize_fn_name("f"), graph_builder._randomize_fn_name("g"), func._randomize_fn_name("f")]
        assert names == ["f_aaaaaaaa", "g_aaaaaaab", "f_aaaaaaac"]
    with compat.numbered_names():
        names = [func._randomize_fn_name("f") for _ in range(30)]
    assert len(set(names)) == 30
    assert all(len(name) == 10 for name in names)


CONVERSION = """
import sys
from pathlib import Path
import torch
from coreai_torch import get_decomp_table
from edgeship.core.model import Signature, TensorSpec
from edgeship.lowering.coreai.convert import convert, save

torch.manual_seed(0)
# A hard sigmoid is made of other operators under a name that is drawn, and a long bias is a constant without a name.
network = torch.nn.Sequential(torch.nn.Linear(4, 2000), torch.nn.Hardsigmoid(), torch.nn.Linear(2000, 2), torch.nn.Hardsigmoid())
exported = torch.export.export(network.eval(), (torch.ones(1, 4),)).run_decompositions(get_decomp_table())
signature = Signature((TensorSpec("x", "f32", (1, 4)),), (TensorSpec("y", "f32", (1, 2)),))
program, _ = convert(exported, {}, {}, signature)
save(program, Path(sys.argv[1]))
"""


def test_two_conversions_give_the_same_bytes(tmp_path) -> None:
    """In processes of their own: what the library draws is the same within one."""
    found = set()
    for number in range(2):
        place = tmp_path / f"{number}.aimodel"
        subprocess.run([sys.executable, "-c", CONVERSION, str(place)], check=True, capture_output=True)
        found.add((place / "main.mlirb").read_bytes())
    (data,) = found
    assert b"hard_sigmoid_aaaaaaaa" in data
    assert re.search(rb"resource_[0-9a-f]{16}\0", data)


def test_equal_constants_share_a_name_and_others_do_not() -> None:
    names = []
    for value in (1.5, 1.5, 2.5):
        with compat.ir.Context(), compat.Location.unknown(), compat.hashed_constants():
            kind = compat.RankedTensorType.get([1000], compat.F32Type.get())
            data = np.full(1000, value, np.float32)
            data[0] = 0
            names.append(
                str(compat._bindings.dialects.coreai.create_elements_attr(compat.Location.unknown(), kind, data))
            )
    assert names[0] == names[1] != names[2]
    assert re.match(r"dense_resource<resource_[0-9a-f]{16}>", names[0])
