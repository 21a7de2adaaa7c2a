"""What edgeship needs of coremltools that it does not document: an upgrade that breaks it is red here and says what."""

from __future__ import annotations

import numpy as np
import pytest

ct = pytest.importorskip("coremltools")

import torch  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Program, types  # noqa: E402
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass  # noqa: E402

from edgeship.compat import coremltools as compat  # noqa: E402


def program(*numbers: float):
    """``x`` plus constants of 200 numbers each: zeros and one number at the end."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(200,))], opset_version=ct.target.iOS16)
    def made(x):
        for i, number in enumerate(numbers):
            # Constants are compared where their first hundred numbers are equal.
            value = np.append(np.zeros(199, np.float32), np.float32(number))
            x = mb.add(x=x, y=mb.const(val=value, name=f"constant_{i}"))
        return x

    return made


@pytest.mark.parametrize(
    ("name", "known"), [("aten.add.Tensor", True), ("aten::linear", True), ("mul", True), ("aten.no_such", False)]
)
def test_the_front_end_says_what_it_lowers(name, known) -> None:
    assert compat.knows_operator(name) is known


def constants(made) -> int:
    return sum(item.op_type == "const" for item in made.functions["main"].operations)


def merged(made) -> int:
    compat.run_passes(made, ct.PassPipeline(["common::const_deduplication", "common::dead_code_elimination"], "test"))
    return constants(made)


def test_constants_become_one_where_they_are_near_and_inside_where_they_are_equal() -> None:
    from coremltools.converters.mil.mil.passes.defs.cleanup.const_deduplication import const_deduplication

    before = const_deduplication.DTYPE2ATOL
    assert set(before) == {types.fp16, types.fp32}
    assert merged(program(0.0, 1e-13)) == 1, "coremltools compares exactly now: the compat function may go"
    with compat.exact_conversion():
        assert merged(program(0.0, 1e-13)) == 2
        assert merged(program(2.0, 2.0)) == 1
    with pytest.raises(ZeroDivisionError), compat.exact_conversion():
        raise ZeroDivisionError
    assert const_deduplication.DTYPE2ATOL is before


def test_a_pass_of_ours_runs() -> None:
    seen = []

    class See(AbstractGraphPass):
        def apply(self, made) -> None:
            seen.append(made)

    name = compat.add_pass("see_test", See)
    assert name == "edgeship::see_test"
    assert compat.add_pass("see_test", See) == name
    made = program(1.0)
    compat.run_passes(made, ct.PassPipeline([name], "test"))
    assert seen == [made]


def test_passes_before_writing() -> None:
    assert "common::const_deduplication" in compat.backend_pipeline().passes


class Net(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2


def test_nodes_of_torch_are_known_by_their_handle() -> None:
    exported = torch.export.export(Net(), (torch.ones(3),)).run_decompositions({})
    for node in exported.graph.nodes:
        if node.name == "relu":
            node.meta["debug_handle"] = 7
    converted = ct.convert(exported, convert_to="milinternal", minimum_deployment_target=ct.target.iOS16)
    operations = list(converted.functions["main"].operations)
    found = {item.op_type: compat.debug_handles(item) for item in operations}
    assert found["relu"] == [7]
    assert all(handle is None for handle in found["mul"])


@torch.library.custom_op("edgeship_test::twice", mutates_args=())
def twice(x: torch.Tensor, times: int) -> torch.Tensor:
    return x * times


@twice.register_fake
def _(x, times):
    return torch.empty_like(x)


def test_the_inputs_of_an_operator_are_counted() -> None:
    given = []

    @ct.converters.mil.register_torch_op(torch_alias=["edgeship_test::twice", "edgeship_test.twice"], override=True)
    def twice(context, node) -> None:
        given.append(compat.inputs_of(context, node, 2))
        context.add(mb.mul(x=given[-1][0], y=np.float32(given[-1][1].val), name=node.name))

    class Twice(torch.nn.Module):
        def forward(self, x):
            return torch.ops.edgeship_test.twice(x, 2)

    exported = torch.export.export(Twice(), (torch.ones(3),)).run_decompositions({})
    ct.convert(exported, convert_to="milinternal", minimum_deployment_target=ct.target.iOS16)
    ((x, times),) = given
    assert x.shape == (3,)
    assert times.val == 2


def test_a_program_is_written_with_the_content_from_elsewhere(tmp_path) -> None:
    made = program(0.5)
    written = []

    class Exporter(compat.MILProtoExporter):
        def create_file_value(self, var):
            writer = self.get_blob_writer(self.get_weight_path(var.op))
            written.append((var.op.name, var.op.weight_id, writer.write_float_data(np.full(200, 3.0, np.float32))))
            return compat.file_value(var, "@model_path/weights/weight.bin", written[-1][2])

    whole = Program()
    whole.add_function("first", made.functions["main"])
    whole.default_function_name = "first"
    whole.export_as_multifunction = True
    exporter = Exporter(whole, str(tmp_path), ct.target.iOS18.value)
    exported = exporter.export()
    exporter.blob_writers.clear()
    assert [item[:2] for item in written] == [("constant_0", None)]
    spec = compat.model_proto(whole, exported, ct.target.iOS18.value)
    assert spec.specificationVersion == ct.target.iOS18.value
    assert list(spec.mlProgram.functions) == ["first"]
    blob = (tmp_path / "weight.bin").read_bytes()
    assert np.frombuffer(blob[-800:], np.float32).tolist() == [3.0] * 200
