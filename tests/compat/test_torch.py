"""What edgeship needs of torch that torch does not document: an upgrade that breaks it is red here and says what."""

from __future__ import annotations

import dataclasses
import inspect
import threading

import pytest
import torch

from edgeship.compat import torch as compat

aten = torch.ops.aten


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.linear(x).reshape(-1) + self.shift


def exported():
    return torch.export.export(Net().eval(), (torch.ones(1, 3),))


def test_operators_say_what_they_are() -> None:
    assert compat.is_operator(aten.add.Tensor)
    assert not compat.is_operator(len)
    assert compat.is_view(aten.view.default)
    assert not compat.is_view(aten.add.Tensor)
    assert not compat.is_view(len)
    assert compat.is_mutable(aten.add_.Tensor)
    assert not compat.is_mutable(aten.add.Tensor)
    assert not compat.is_mutable(len)


def test_a_schema_says_what_is_aliased() -> None:
    assert compat.schema_of(len) is None
    schema = compat.schema_of(aten.add_.Tensor)
    assert [item.name for item in schema.arguments] == ["self", "other", "alpha"]
    assert schema.arguments[0].alias_info.is_write
    assert schema.arguments[1].alias_info is None


def test_the_dispatcher_lists_its_operators() -> None:
    names = compat.operator_names()
    assert {"aten::add.Tensor", "aten::linear"} <= names


def test_pairs_round_to_the_nearest_even() -> None:
    ops = compat.pair_operators()
    given = torch.tensor([-0.26, 0.05, 0.15, 99.0])
    numbers = (0.1, 3, -128, 127, torch.int8)
    stored = ops.quantize_per_tensor.default(given, *numbers)
    assert stored.tolist() == [0, 3, 5, 127]
    back = ops.dequantize_per_tensor.default(stored, *numbers)
    assert torch.allclose(back, torch.tensor([-0.3, 0.0, 0.2, 12.4]))
    assert "quantized_decomposed::quantize_per_tensor" in compat.operator_names()


def test_decompositions_spell_operators_out() -> None:
    rule = compat.decomposition_of(aten.silu.default)
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(rule(x), torch.nn.functional.silu(x))
    assert compat.decomposition_of(aten.add.Tensor) is None or callable(compat.decomposition_of(aten.add.Tensor))
    assert compat.decomposition_of(len) is None


def test_onednn_multiplies_as_torch_does() -> None:
    call = compat.onednn_linear()
    if call is None:
        pytest.skip("this build of torch has no oneDNN")
    left, right = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.allclose(call(left, right, None, "none", [], ""), left @ right.T, atol=1e-5)


def test_trees() -> None:
    tree = {"b": [1, (torch.ones(2), None)], "a": 3}
    leaves = compat.leaves_of(tree)
    assert len(leaves) in (4, 3)
    again = compat.with_structure(leaves, compat.structure_of(tree))
    assert list(again) == ["b", "a"]
    assert again["b"][1][0] is tree["b"][1][0]
    mapped = compat.map_tensors(lambda item: item * 2, tree)
    assert mapped["b"][1][0].tolist() == [2, 2]
    assert mapped["a"] == 3


def test_fake_tensors_have_shapes_and_no_numbers() -> None:
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(torch.ones(2, 3))
    assert isinstance(fake, compat.FakeTensor)
    with mode:
        assert torch.cat([fake, fake]).shape == (4, 3)
        with pytest.raises(compat.DataDependentOutputException):
            fake.sum().item()
        with pytest.raises(compat.DynamicOutputShapeException):
            torch.nonzero(fake)


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert aten.add.Tensor in seen


def test_a_weak_table_goes_by_identity() -> None:
    table = compat.WeakIdKeyDictionary()
    one, other = torch.ones(1), torch.ones(1)
    table[one] = "one"
    assert table.get(one) == "one"
    assert table.get(other) is None
    del one
    assert len(table) == 0


def test_parts_of_a_program_are_replaced_in_a_copy() -> None:
    import copy

    program = exported()
    weights = {name: type(value)(torch.zeros_like(value)) for name, value in program.state_dict.items()}
    hollow = compat.replaced(program, state_dict=weights)
    assert hollow.graph_module is program.graph_module
    assert hollow.module()(torch.ones(1, 3)).tolist() == [0, 0]
    assert program.module()(torch.ones(1, 3)).tolist() != [0, 0]
    module, signature = copy.deepcopy(program.graph_module), copy.deepcopy(program.graph_signature)
    calls = copy.deepcopy(program.module_call_graph)
    other = compat.replaced(program, graph_module=module, graph_signature=signature, module_call_graph=calls)
    assert other.graph_module is module
    assert other.graph_signature is signature
    assert other.module_call_graph is calls
    assert program.graph_module is not module
    assert torch.equal(other.module()(torch.ones(1, 3)), program.module()(torch.ones(1, 3)))


def test_a_program_may_end_elsewhere_by_its_call_graph() -> None:
    calls = exported().module_call_graph
    assert calls[0].signature.out_spec == compat.structure_of(torch.ones(1))
    assert list(calls[0].signature.outputs) == []


SCHEMA = {
    "ExportedProgram": {"graph_module", "range_constraints", "guards_code", "verifiers"},
    "GraphModule": {"graph", "signature", "module_call_graph", "metadata", "treespec_namedtuple_fields"},
    "Node": {"target", "inputs", "outputs", "metadata"},
    "TensorMeta": {"dtype", "sizes", "strides", "storage_offset"},
    "PayloadConfig": {"config"},
    "PayloadMeta": {"path_name", "is_param", "use_pickle", "tensor_meta"},
}


@pytest.mark.parametrize("name", SCHEMA)
def test_records_of_archives_have_the_fields(name) -> None:
    kind = getattr(compat.archive_schema(), name)
    assert SCHEMA[name] <= {item.name for item in dataclasses.fields(kind)}


def test_nodes_of_archives_may_have_names() -> None:
    schema = compat.archive_schema()
    named = {"name": "add"} if "name" in {item.name for item in dataclasses.fields(schema.Node)} else {}
    node = schema.Node(target="torch.ops.aten.add.Tensor", inputs=[], outputs=[], metadata={}, **named)
    assert compat.name_of_node(node) == named.get("name")


def test_unions_of_archives() -> None:
    schema = compat.archive_schema()
    assert compat.is_union(schema.Argument)
    assert not compat.is_union(schema.Node)
    assert schema.Argument.create(as_int=3).type == "as_int"


def test_numbers_of_dtypes() -> None:
    schema = compat.archive_schema()
    assert compat.dtype_of_code(schema.ScalarType.FLOAT) == torch.float32
    assert compat.dtype_of_code(schema.ScalarType.BFLOAT16) == torch.bfloat16
    with pytest.raises(KeyError):
        compat.dtype_of_code(999)


def test_what_a_file_holds_is_read_from_records_and_tensors(tmp_path) -> None:
    from edgeship.program.archive import read_archive

    program = exported()
    torch.export.save(program, tmp_path / "net.pt2")
    x = torch.randn(1, 3)
    assert torch.equal(read_archive(tmp_path / "net.pt2").module()(x), program.module()(x))
    names = list(inspect.signature(compat.deserialized).parameters)
    assert names == ["program", "weights", "constants", "samples"]


def hooks() -> dict:
    return dict(torch.nn.modules.module._global_parameter_registration_hooks)


def test_parameters_are_on_the_meta_device_inside_alone() -> None:
    before, register = hooks(), torch.nn.Module.register_parameter
    with compat.on_meta_device():
        inside = Net()
        with compat.on_meta_device():
            Net()
        still = Net()
    assert inside.linear.weight.is_meta
    assert still.linear.weight.is_meta
    assert not inside.shift.is_meta
    assert not Net().linear.weight.is_meta
    assert hooks() == before
    assert torch.nn.Module.register_parameter is register


def test_it_ends_with_an_error_too() -> None:
    before = hooks()
    with pytest.raises(ZeroDivisionError), compat.on_meta_device():
        raise ZeroDivisionError
    assert hooks() == before
    assert not Net().linear.weight.is_meta


def test_other_threads_make_modules_as_always() -> None:
    made = []
    with compat.on_meta_device():
        thread = threading.Thread(target=lambda: made.append(Net()))
        thread.start()
        thread.join()
    assert not made[0].linear.weight.is_meta


def test_threads_that_overlap_leave_nothing_behind() -> None:
    before = hooks()
    made = []

    def make() -> None:
        with compat.on_meta_device():
            made.extend(Net().linear.weight.is_meta for _ in range(50))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [True] * 200
    assert hooks() == before


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_go_on_as_if_none_had_been_drawn(fails) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state()
    try:
        with compat.seeded(0):
            first = torch.rand(4)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4), first)


def test_an_error_that_leaves_a_module_can_be_caught_in_a_trace() -> None:
    class Stops(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())

        def forward(self, x):
            kept = []

            def hook(module, given, answer):
                kept.append(answer)
                raise ZeroDivisionError

            handle = self.net[0].register_forward_hook(hook)
            try:
                with compat.outside_of_tracing():
                    self.net(x)
            except ZeroDivisionError:
                pass
            finally:
                handle.remove()
            return kept[0]

    program = torch.export.export(Stops(), (torch.ones(1, 3),), strict=False)
    assert not any("relu" in node.name for node in program.graph.nodes)


def test_a_branch_goes_where_the_values_go() -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("limit", torch.tensor(2.0))

        def forward(self, x):
            return x * 2 if self.limit > 1 else x

    with compat.with_real_values():
        program = torch.export.export(Branches(), (torch.ones(1, 3),), strict=False)
    assert any("mul" in node.name for node in program.graph.nodes)
    assert any(node.target == torch.ops.aten.item.default for node in program.graph.nodes)


def test_steps_of_a_batched_function_are_known() -> None:
    class Batches(torch.nn.Module):
        def forward(self, x):
            return torch.vmap(lambda row: row * row.sum())(x)

    program = torch.export.export(Batches(), (torch.ones(2, 3),), strict=False)
    assert any(compat.is_batching(node.target) for node in program.graph.nodes)
    plain = program.run_decompositions({})
    assert not any(compat.is_batching(node.target) for node in plain.graph.nodes)


def test_operators_by_name() -> None:
    assert compat.operator_named("aten::relu") is aten.relu.default
    assert compat.operator_named("torchvision::no_such_operator") is None


@pytest.mark.parametrize("name", compat.__all__)
def test_everything_is_there(name) -> None:
    assert callable(getattr(compat, name))


def test_shapes_that_do_not_fit_are_not_logged_inside(caplog) -> None:
    def fail() -> None:
        with pytest.raises(RuntimeError), compat.FakeTensorMode():
            torch.ones(2, 3) @ torch.ones(2, 3)

    caplog.clear()
    with compat.quiet_shape_errors():
        fail()
    assert not [item for item in caplog.records if item.levelname == "ERROR"]
    fail()
    assert [item.name for item in caplog.records if item.levelname == "ERROR"] == ["torch._subclasses.fake_tensor"], (
        "torch logs them elsewhere, or not any more"
    )


def test_the_exporters_table_of_onnx_forms_is_made_once() -> None:
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    from edgeship.lowering.onnx.export import OPSET

    kind = registration.ONNXRegistry
    before = vars(kind)["from_torchlib"]
    with compat.onnx_table_kept(OPSET):
        first, second = (kind.from_torchlib(opset_version=OPSET) for _ in range(2))
    assert vars(kind)["from_torchlib"] is before
    entry = "aten::relu"
    assert first.functions[entry][0] is second.functions[entry][0]
    first.functions[entry].clear()
    assert second.functions[entry], "what one caller registers is seen by another"


def test_the_kept_table_is_the_exporters_own() -> None:
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    from edgeship.lowering.onnx.export import OPSET

    own = registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    with compat.onnx_table_kept(OPSET):
        kept = registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    assert kept.opset_version == own.opset_version
    assert {target: [form.onnx_function for form in forms] for target, forms in kept.functions.items()} == {
        target: [form.onnx_function for form in forms] for target, forms in own.functions.items()
    }


class Whole(torch.nn.Module):
    """Operators that are kept, that the table rewrites, and that are taken apart because they alias."""

    def forward(self, x):
        halves = torch.nn.functional.silu(torch.nn.functional.linear(x, x)).chunk(2, -1)
        return torch.einsum("ij,kj->ik", halves[0], halves[1]) + torch.nn.functional.group_norm(x, 2)


def test_quick_decompositions_make_the_same_graph_and_leave_nothing() -> None:
    program = torch.export.export(Whole().eval(), (torch.ones(4, 4),))
    table = {aten.silu.default: lambda x: x * torch.sigmoid(x)}
    kernels = {name: dict(getattr(aten, name).default.py_kernels) for name in ("linear", "silu", "einsum")}
    plain = program.run_decompositions(dict(table))
    quick = compat.decomposed(program, table)
    assert [(node.name, node.target) for node in quick.graph.nodes] == [
        (node.name, node.target) for node in plain.graph.nodes
    ]
    assert {name: dict(getattr(aten, name).default.py_kernels) for name in kernels} == kernels
    assert table.keys() == {aten.silu.default}, "torch takes entries out of the table it is given"
