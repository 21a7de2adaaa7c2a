"""Whole programs: states, functions, control flow, lists, classifiers, and packages that are wrong."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from edgeship.errors import ArtifactError, DataError, UnsupportedOpError
from edgeship.runtimes.coreml.evaluator import Evaluator, supported_ops
from edgeship.runtimes.coreml.program import load_program
from edgeship.runtimes.coreml.weights import read_stored_weights

X = np.array([[1, 2, 3, 4]], np.float32)
FOUR = {"x": ((1, 4), np.float32)}


def mb():
    from coremltools.converters.mil.mil import Builder

    return Builder


def test_a_state_lives_from_run_to_run(builder):
    from coremltools.converters.mil.mil import types

    @mb().program(
        input_specs=[
            mb().StateTensorSpec((1, 4), dtype=types.fp16),
            mb().TensorSpec((1, 2), dtype=types.fp16),
            mb().TensorSpec((1,), dtype=types.int32),
        ],
        opset_version=builder.ct.target.iOS18,
    )
    def program(cache, x, position):
        before = mb().read_state(input=cache)
        column = mb().slice_by_size(x=position, begin=[0], size=[1])
        begin = mb().concat(values=[np.array([0], np.int32), column], axis=0)
        end = mb().add(x=begin, y=np.array([1, 2], np.int32))
        after = mb().slice_update(x=before, update=x, begin=begin, end=end)
        held = mb().coreml_update_state(state=cache, value=after)
        return mb().reduce_sum(x=held, axes=[1]), before

    path = builder.convert(program, "iOS18")
    evaluator = Evaluator(path)
    assert [(f.name, f.shape, f.dtype) for f in evaluator.states] == [("cache", (1, 4), "float16")]
    assert [f.name for f in evaluator.inputs] == ["x", "position"]
    state = evaluator.new_state()

    def step(values, position):
        inputs = {"x": np.array([values], np.float16), "position": np.array([position], np.int32)}
        return list(evaluator.run(inputs, state).values())

    total, before = step([1, 2], 0)
    assert total.item() == 3
    assert before.tolist() == [[0, 0, 0, 0]]
    total, before = step([5, 7], 2)
    assert total.item() == 15
    assert before.tolist() == [[1, 2, 0, 0]]
    assert state["cache"].tolist() == [[1, 2, 5, 7]]
    assert evaluator.new_state()["cache"].sum() == 0
    with pytest.raises(DataError, match="keeps the states"):
        evaluator.run({"x": np.zeros((1, 2), np.float16), "position": np.zeros(1, np.int32)})


def test_functions_of_one_package(builder, tmp_path):
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    paths = [
        builder.save(lambda x: mb().linear(x=x, weight=weight, name="product"), FOUR, "iOS18"),
        builder.save(lambda x: mb().linear(x=mb().relu(x=x), weight=weight, name="product"), FOUR, "iOS18"),
    ]
    descriptor = builder.ct.utils.MultiFunctionDescriptor()
    descriptor.add_function(str(paths[0]), "main", "prefill")
    descriptor.add_function(str(paths[1]), "main", "decode")
    descriptor.default_function_name = "decode"
    merged = tmp_path / "merged.mlpackage"
    builder.ct.utils.save_multifunction(descriptor, str(merged))
    assert set(Evaluator(merged).function_names) == {"prefill", "decode"}
    assert Evaluator(merged).run({"x": -X})["product"].tolist() == [[0, 0, 0, 0]]
    np.testing.assert_array_equal(Evaluator(merged, "prefill").run({"x": -X})["product"], -X @ weight.T)
    assert [w.kind for w in read_stored_weights(merged).values() if w.shape == (4, 4)] == ["float32"]
    with pytest.raises(ArtifactError, match=re.escape("no function 'main'")):
        Evaluator(merged, "main")


@pytest.mark.parametrize(("start", "want"), [(1.0, 16.0), (20.0, -20.0)])
def test_branches_and_loops(builder, start, want):
    def build(x):
        total = mb().reduce_sum(x=x)

        def double():
            return mb().while_loop(
                _cond=lambda v: mb().less(x=v, y=10.0), _body=lambda v: mb().mul(x=v, y=2.0), loop_vars=(total,)
            )

        return mb().cond(pred=mb().less(x=total, y=10.0), _true_fn=double, _false_fn=lambda: mb().mul(x=total, y=-1.0))

    (got,) = builder.run(build, {"x": np.array([start], np.float32)})
    assert got == want


def test_lists(builder):
    def build(a, b):
        items = mb().make_list(init_length=2, elem_shape=(2,))
        first = mb().list_read(ls=items, index=0)
        items = mb().list_write(ls=items, index=0, value=a)
        items = mb().list_write(ls=items, index=4, value=b)
        items = mb().list_scatter(ls=items, indices=[2, 1], value=np.array([[-1, -2], [-4, -5]], np.float32))
        return first, mb().list_read(ls=items, index=0), mb().list_gather(ls=items, indices=[4, 2, 3])

    a, b = np.array([1, 3], np.float32), np.array([2, 4], np.float32)
    first, read, gathered = builder.run(build, {"a": a, "b": b})
    assert first.tolist() == [0, 0]
    assert read.tolist() == [1, 3]
    assert gathered.tolist() == [[2, 4], [-1, -2], [0, 0]]


def test_static_quantization(builder):
    x = np.array([[-2, -0.26, 0.25, 0.75], [0.1, 1, 3, 200]], np.float32)
    scale, zero = np.array([0.5, 1], np.float32), np.array([0, 10], np.int8)

    def build(x):
        by_row = mb().quantize(input=x, scale=scale, zero_point=zero, axis=0, output_dtype="int8")
        whole = mb().quantize(input=x, scale=np.float32(0.5), zero_point=np.uint8(3), output_dtype="uint8")
        return [
            mb().cast(x=by_row, dtype="int32"),
            mb().dequantize(input=by_row, scale=scale, zero_point=zero, axis=0),
            mb().cast(x=whole, dtype="int32"),
        ]

    rows, back, whole = builder.run(build, {"x": x})
    assert rows.tolist() == [[-4, -1, 0, 2], [10, 11, 13, 127]]  # 0.5 and 1.5 round to even
    assert back.tolist() == [[-2, -0.5, 0, 1], [0, 1, 3, 117]]
    assert whole.tolist() == [[0, 2, 3, 5], [3, 5, 9, 255]]


def test_a_classifier_answers_with_a_label(ct, tmp_path):
    import torch

    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.softmax(x, dim=1)

    traced = torch.jit.trace(Net().eval(), torch.zeros(1, 3))
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name="x", shape=(1, 3))],
        classifier_config=ct.ClassifierConfig(["cat", "dog", "eel"]),
        convert_to="mlprogram",
        skip_model_load=True,
    )
    path = tmp_path / "classifier.mlpackage"
    model.save(str(path))
    answer = Evaluator(path).run({"x": np.array([[0, 3, 1]], np.float32)})
    assert answer["classLabel"].item() == "dog"
    probabilities = next(v for k, v in answer.items() if k != "classLabel")
    assert probabilities.argmax() == 1
    assert probabilities.sum() == pytest.approx(1, abs=1e-2)


def test_flexible_sizes(builder):
    from coremltools.converters.mil.mil import get_new_symbol

    path = builder.save(
        lambda x: mb().reshape(x=mb().relu(x=x), shape=[-1, 2]), {"x": ((get_new_symbol(), 4), np.float32)}
    )
    evaluator = Evaluator(path)
    assert evaluator.inputs[0].shape == (None, 4)
    assert evaluator.inputs[0].default_shape == (1, 4)
    for rows in (1, 3):
        (got,) = evaluator.run({"x": np.ones((rows, 4), np.float32)}).values()
        assert got.shape == (2 * rows, 2)


def test_inputs_have_to_fit(builder):
    evaluator = Evaluator(builder.save(lambda x: mb().relu(x=x, name="y"), FOUR))
    assert [(f.name, f.shape, f.dtype) for f in evaluator.outputs] == [("y", (1, 4), "float32")]
    with pytest.raises(DataError, match="takes"):
        evaluator.run({"z": X})
    with pytest.raises(DataError, match=re.escape("the model takes (1, 4)")):
        evaluator.run({"x": X[:, :3]})
    assert evaluator.run({"x": X.astype(np.float64)})["y"].dtype == np.float32


def edit(path, change):
    """Changes the program in a package through its protobuf."""
    from coremltools.proto import Model_pb2

    file = path / "Data/com.apple.CoreML/model.mlmodel"
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    change(spec, block)
    file.write_bytes(spec.SerializeToString())
    return path


def test_an_unknown_operation_is_named_at_once(builder):
    def rename(spec, block):
        block.operations[-1].type = "warp_field"

    path = edit(builder.save(lambda x: mb().relu(x=x, name="y"), FOUR), rename)
    with pytest.raises(UnsupportedOpError, match=r"warp_field \(y\) in function main"):
        Evaluator(path)


def test_a_program_that_contradicts_itself_is_refused(builder):
    def widen(spec, block):
        block.operations[-1].outputs[0].type.tensorType.dimensions[1].constant.size = 5

    evaluator = Evaluator(edit(builder.save(lambda x: mb().relu(x=x), FOUR), widen))
    with pytest.raises(UnsupportedOpError, match=re.escape("gives the shape (1, 4) where the program declares (1, 5)")):
        evaluator.run({"x": X})


@pytest.fixture
def package(builder):
    weight = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    return builder.save(lambda x: mb().linear(x=x, weight=weight), FOUR)


def test_damaged_packages(package, tmp_path):
    def copy(name):
        return shutil.copytree(package, tmp_path / name)

    def refused(path, message):
        with pytest.raises(ArtifactError, match=message):
            Evaluator(path).run({"x": X})
        with pytest.raises(ArtifactError, match=message):
            read_stored_weights(path)

    weights, model = "Data/com.apple.CoreML/weights/weight.bin", "Data/com.apple.CoreML/model.mlmodel"
    Evaluator(package).run({"x": X})
    missing = copy("missing.mlpackage")
    (missing / weights).unlink()
    refused(missing, r"weight\.bin is missing")
    for size, message in ((10, "too short"), (90, "ends before it"), (600, "ends inside it")):
        short = copy(f"short{size}.mlpackage")
        (short / weights).write_bytes((package / weights).read_bytes()[:size])
        refused(short, message)
    wrong = copy("wrong.mlpackage")
    (wrong / weights).write_bytes(bytes(len((package / weights).read_bytes())))
    refused(wrong, "no record starts there")
    garbled = copy("garbled.mlpackage")
    (garbled / model).write_bytes(b"\xff" * 100)
    refused(garbled, "is damaged")
    empty = copy("empty.mlpackage")
    (empty / model).unlink()
    refused(empty, "lacks its model file")
    manifest = copy("manifest.mlpackage")
    (manifest / "Manifest.json").write_text("{")
    refused(manifest, "is damaged")
    refused(tmp_path / "nothing.mlpackage", "not an mlpackage")


def test_a_weight_file_outside_the_package_is_refused(package):
    def escape(spec, block):
        for operation in block.operations:
            for value in operation.attributes.values():
                if value.WhichOneof("value") == "blobFileValue":
                    value.blobFileValue.fileName = "@model_path/../../../weight.bin"

    with pytest.raises(ArtifactError, match="outside the package"):
        Evaluator(edit(package, escape))


def test_the_program_keeps_its_opset(builder):
    for opset, number in (("iOS15", 5), ("iOS16", 6), ("iOS17", 7), ("iOS18", 8)):
        program = load_program(builder.save(lambda x: mb().relu(x=x), FOUR, opset))
        assert program.functions["main"].opset == number


#: What the lowered models of the model zoo, stateful decoders and compressed weights are made of.
NEEDED = """
    abs add argsort avg_pool batch_norm band_part cast ceil clip concat cond const conv conv_transpose cos
    crop_resize cumsum depth_to_space dequantize einsum equal erf exp expand_dims fill fill_like floor floor_div
    gather gather_along_axis gather_nd gelu greater greater_equal gru identity instance_norm inverse l2_norm
    layer_norm leaky_relu less less_equal linear local_response_norm log logical_and logical_not logical_or
    logical_xor lstm matmul max_pool maximum minimum mod mul non_maximum_suppression non_zero not_equal one_hot
    pad pixel_shuffle pixel_unshuffle pow prelu quantize range_1d read_state real_div reduce_argmax
    reduce_argmin reduce_l2_norm reduce_max reduce_mean reduce_min reduce_prod reduce_sum reduce_sum_square relu
    relu6 resample reshape reshape_like resize resize_bilinear resize_nearest_neighbor reverse round rsqrt
    scaled_dot_product_attention scatter scatter_along_axis scatter_nd select shape sigmoid sigmoid_hard sign
    silu sin slice_by_index slice_by_size slice_update sliding_windows softmax softplus softsign space_to_depth
    split sqrt square squeeze stack sub tan tanh threshold tile topk transpose upsample_bilinear
    upsample_nearest_neighbor while_loop write_state constexpr_affine_dequantize constexpr_blockwise_shift_scale
    constexpr_cast constexpr_lut_to_dense constexpr_lut_to_sparse constexpr_sparse_blockwise_shift_scale
    constexpr_sparse_to_dense
"""


def test_supported_operations():
    assert set(NEEDED.split()) <= supported_ops()


def test_only_random_operations_are_missing(ct):
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    missing = set(SSAOpRegistry.core_ops) - supported_ops() - {"_const_symbolic"}
    assert missing == {"random_bernoulli", "random_categorical", "random_normal", "random_uniform"}
