"""Nothing passes verify that is not what was decided: changed numbers, wrong arithmetic, and references that say nothing."""

from __future__ import annotations

import dataclasses
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.core.model import OnnxModel, TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.profile import DataRef
from edgeship.core.weights import Affine
from edgeship.errors import UsageError
from edgeship.passes.check.verify import MIN_SNR_DB, VerifyArtifact, _near
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program
from edgeship.program.judging import Scales
from edgeship.program.program import TorchProgram
from edgeship.program.trial import GIVEN, Kind


@dataclasses.dataclass
class Case:
    artifact: OnnxModel
    reference: TorchModel
    original: TorchModel
    folder: object

    def verify(self, **options):
        task = VerifyArtifact("onnx", **options)
        return task.run(self.artifact, self.reference, self.original, Context(self.folder))


def program_of(model: nn.Module) -> TorchProgram:
    return make_program(model, [TensorSpec("x", "f32", (1, 8))], [torch.randn(1, 8)])


def saved(program: TorchProgram, folder) -> TorchModel:
    program.save(folder)
    return TorchModel(folder, program.signature)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Case:
    base = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    program = program_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)))
    encoded = {name: quantize_nearest(program.weights[name], Affine(8), name=name) for name in ("0.weight", "2.weight")}
    record = dataclasses.replace(program.record, encodings={name: item.encoding for name, item in encoded.items()})
    decided = dataclasses.replace(program, encoded=encoded, record=record)
    original, reference = saved(program, base / "original"), saved(decided, base / "reference")
    (base / "out").mkdir()
    return Case(TorchToOnnx().run(reference, Context(base / "out")), reference, original, base)


@pytest.fixture
def case(built, tmp_path) -> Case:
    shutil.copytree(built.artifact.path.parent, tmp_path / "copy")
    return dataclasses.replace(
        built, artifact=dataclasses.replace(built.artifact, path=tmp_path / "copy" / "model.onnx")
    )


def change(case: Case, name: str, how) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(case.artifact.path)
    (tensor,) = [item for item in model.graph.initializer if item.name == name]
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(how(array), name))
    onnx.save(model, case.artifact.path)


def stored(case: Case, weight: str) -> str:
    return next(item.stored for item in case.artifact.placements if item.weight == weight)


def test_what_was_stored_as_decided_passes(case):
    verdict = case.verify()
    assert verdict.passed, verdict.summary
    assert verdict.summary.startswith("2 weights read back equal")
    assert verdict.measurement("weights_read_back").value == 2
    assert verdict.measurement("samples").value == 16
    assert verdict.measurement("lowering_snr").value > 100
    assert 20 < verdict.measurement("total_snr").value < 70
    assert verdict.measurement("lowering_snr").how == "measured"


def test_one_changed_integer_fails_and_names_its_weight(case):
    name = stored(case, "2.weight")

    def one_more(array):
        array.reshape(-1)[3] += 1 if array.reshape(-1)[3] < 100 else -1
        return array

    change(case, name, one_more)
    verdict = case.verify()
    assert not verdict.passed
    assert "weight 2.weight is not stored as decided: values: 1 of 80 numbers differ" in verdict.summary
    assert "--profile exact" in verdict.fix


def test_what_is_exact_already_is_not_sent_to_exact(case):
    name = stored(case, "2.weight")
    change(case, name, lambda array: array + 5)
    verdict = dataclasses.replace(case, reference=case.original).verify()
    assert not verdict.passed
    assert "exact" not in verdict.fix
    assert "--runtime" in verdict.fix


def test_a_changed_scale_fails(case):
    import onnx

    model = onnx.load(case.artifact.path)
    scales = [item.name for item in model.graph.initializer if "scale" in item.name]
    assert scales
    change(case, scales[0], lambda array: np.nextafter(array, array.dtype.type(np.inf)))
    verdict = case.verify()
    assert not verdict.passed
    assert "scale" in verdict.summary


def test_a_changed_bias_fails_by_its_answers(case):
    """Weights that were not encoded are not read back: running the file finds them."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(case.artifact.path)
    biases = [
        item.name for item in model.graph.initializer
        if item.data_type == onnx.TensorProto.FLOAT and numpy_helper.to_array(item).shape == (5,)
        and "scale" not in item.name
    ]  # fmt: skip
    change(case, biases[0], lambda array: array + 0.05)
    verdict = case.verify()
    assert not verdict.passed
    assert "dB against the reference, 70 dB wanted for f32" in verdict.summary


def test_the_limit_can_be_set(case):
    assert not case.verify(min_snr_db=199.5).passed
    assert case.verify(min_snr_db=10.0).passed


def data_of(count: int, folder) -> DataRef:
    path = folder / f"{count}.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32))
    return DataRef(str(path), "")


def test_data_of_the_user_is_what_it_runs_on(case, tmp_path):
    verdict = case.verify(data=data_of(40, tmp_path))
    assert verdict.passed
    assert verdict.summary.endswith("16 inputs and 8 kinds of probes")
    assert verdict.measurement("samples").value == verdict.measurement("total_snr").runs == 16
    generated = case.verify()
    assert verdict.measurement("total_snr").value != generated.measurement("total_snr").value


def test_where_the_data_holds_too_few_the_rest_is_generated_and_said(case, tmp_path):
    verdict = case.verify(data=data_of(3, tmp_path))
    assert verdict.passed
    assert verdict.summary.endswith("16 inputs (3 given, 13 generated) and 8 kinds of probes")
    assert verdict.measurement("samples").value == verdict.measurement("lowering_snr").runs == 16
    assert verdict.measurement("total_snr").runs == 3, "what the user loses is measured on the user's data"
    assert case.verify(data=data_of(3, tmp_path), min_snr_db=199.5).summary.endswith(
        "13 generated) and 8 kinds of probes"
    )


@pytest.mark.parametrize(("runtime", "fewest"), [("onnx", 16), ("tflite", 16), ("qnn", 4)])
def test_fewer_inputs_than_prove_anything_are_refused(runtime, fewest):
    VerifyArtifact(runtime, samples=fewest).confirm(None)
    for samples in (fewest - 1, 1, 0, -5):
        with pytest.raises(UsageError, match=f"samples must be at least {fewest} for {runtime}; leave it out"):
            VerifyArtifact(runtime, samples=samples).confirm(None)


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_a_reference_that_says_nothing_never_passes(kind, tmp_path):
    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x) * 0 + (0.0 if kind == "zero" else 3.0)

    program = saved(program_of(Mute()), tmp_path / "p")
    (tmp_path / "out").mkdir()
    artifact = TorchToOnnx().run(program, Context(tmp_path / "out"))
    verdict = VerifyArtifact("onnx").run(artifact, program, program, Context(tmp_path))
    assert not verdict.passed
    assert "the reference says nothing" in verdict.summary
    assert verdict.fix.startswith("give --calibration DATA on which the outputs differ")


def test_a_weight_without_a_place_fails(case):
    some = [item for item in case.artifact.placements if item.weight != "0.weight"]
    verdict = dataclasses.replace(case, artifact=dataclasses.replace(case.artifact, placements=tuple(some))).verify()
    assert not verdict.passed
    assert "weight 0.weight was decided but is not found" in verdict.summary


def test_integer_outputs_must_agree(tmp_path):
    class Pick(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 50)

        def forward(self, x):
            scores = self.layer(x)
            return scores, scores.argmax(-1)

    torch.manual_seed(0)
    program = saved(program_of(Pick()), tmp_path / "p")
    (tmp_path / "out").mkdir()
    artifact = TorchToOnnx().run(program, Context(tmp_path / "out"))
    verdict = VerifyArtifact("onnx").run(artifact, program, program, Context(tmp_path))
    assert verdict.passed
    assert verdict.measurement("agreement").value == 1
    other = Case(artifact, program, program, tmp_path)
    import onnx
    from onnx import numpy_helper

    model = onnx.load(artifact.path)
    name = next(item.name for item in model.graph.initializer if numpy_helper.to_array(item).shape == (50,))
    change(other, name, lambda array: np.roll(array, 7) * 20)
    broken = other.verify(min_snr_db=-300.0)
    assert not broken.passed
    assert "integer outputs agree in" in broken.summary


def lowered(model, specs, base, outputs=()):
    torch.manual_seed(0)
    examples = [torch.randn(spec.shape) for spec in specs]
    program = make_program(model, specs, examples, output_names=outputs)
    made = saved(program, base / "p")
    (base / "out").mkdir()
    return TorchToOnnx().run(made, Context(base / "out")), made


def edit(artifact, how) -> None:
    import onnx

    model = onnx.load(artifact.path)
    how(model.graph)
    onnx.save(model, artifact.path)


class Detector(nn.Module):
    """Boxes of 0 to 640 beside scores of 0 to 1."""

    def __init__(self):
        super().__init__()
        self.box, self.score = nn.Linear(8, 4), nn.Linear(8, 20)

    def forward(self, x):
        return torch.cat([640 * self.box(x).sigmoid(), (self.score(x) - 3).sigmoid()], 1)


def test_scores_that_are_gone_fail_though_the_boxes_are_right(tmp_path):
    from onnx import helper, numpy_helper

    artifact, program = lowered(Detector().eval(), [TensorSpec("x", "f32", (1, 8))], tmp_path)
    assert VerifyArtifact("onnx").run(artifact, program, program, Context(tmp_path)).passed

    def flatten_scores(graph):
        keep = numpy_helper.from_array(np.array([1] * 4 + [0] * 20, np.float32), "keep")
        add = numpy_helper.from_array(np.array([0] * 4 + [0.05] * 20, np.float32), "flat")
        graph.initializer.extend([keep, add])
        name = graph.output[0].name
        for node in graph.node:
            node.output[:] = ["whole" if item == name else item for item in node.output]
        graph.node.append(helper.make_node("Mul", ["whole", "keep"], ["boxes"]))
        graph.node.append(helper.make_node("Add", ["boxes", "flat"], [name]))

    edit(artifact, flatten_scores)
    verdict = VerifyArtifact("onnx", min_snr_db=30.0).run(artifact, program, program, Context(tmp_path))
    assert verdict.measurement("total_snr").value > 60, "the boxes alone make the ratio of the whole tensor"
    assert not verdict.passed
    assert re.match(r"output\[:, \d[^]]*\] on noise: one constant, where the original's values vary", verdict.summary)
    assert verdict.measurement("worst_slice_distinct").value == 1


class Best(nn.Module):
    """The best ten of forty boxes; the first two of them nearly tie."""

    def __init__(self):
        super().__init__()
        self.score, self.box = nn.Linear(8, 40), nn.Linear(8, 160)
        with torch.no_grad():
            self.score.weight[1] = self.score.weight[0]
            self.score.bias[0], self.score.bias[1] = 9.0, 9.0 - 1e-4

    def forward(self, x):
        # [1, 40] -> [40]; [1, 160] -> [40, 4]
        scores, places = self.score(x.tanh())[0].topk(10)
        boxes = self.box(x).sigmoid().reshape(40, 4) * 320
        return {"boxes": boxes[places], "scores": scores, "places": places}


def rewired(graph, change) -> None:
    """Put what ``change`` makes behind each output of a graph."""
    for output in graph.output:
        for node in graph.node:
            node.output[:] = [f"{output.name}_own" if item == output.name else item for item in node.output]
            node.input[:] = [f"{output.name}_own" if item == output.name else item for item in node.input]
        change(graph, f"{output.name}_own", output.name)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return lowered(Best().eval(), [TensorSpec("x", "f32", (1, 8))], tmp_path_factory.mktemp("best"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([1, 0, *range(2, 10)], ""),
        ([9, *range(1, 9), 0], "out of order"),
        ([*range(9), 8], "lost, 16 invented"),
        ([0, 0, *range(2, 10)], "144 of 160, 16 lost, 16 invented"),
    ],
)
def test_chosen_rows_are_compared_as_sets(best, tmp_path, rows, says):
    from onnx import helper, numpy_helper

    artifact, program = best
    shutil.copytree(artifact.path.parent, tmp_path / "copy")
    artifact = dataclasses.replace(artifact, path=tmp_path / "copy" / artifact.path.name)

    def reorder(graph, source, name):
        graph.node.append(helper.make_node("Gather", [source, "order"], [name], axis=0))

    def change(graph):
        graph.initializer.append(numpy_helper.from_array(np.array(rows, np.int64), "order"))
        rewired(graph, reorder)

    edit(artifact, change)
    verdict = VerifyArtifact("onnx").run(artifact, program, program, Context(tmp_path))
    assert verdict.passed == (not says), verdict.summary
    if says:
        assert says in verdict.summary
    else:
        assert "chosen rows that agree: 160 of 160 with the reference; 160 of 160 with the original" in verdict.summary
        assert verdict.measurement("rows_agreed").value == 160


def test_a_shifted_box_is_another_one(best, tmp_path):
    from onnx import helper, numpy_helper

    artifact, program = best
    shutil.copytree(artifact.path.parent, tmp_path / "copy")
    artifact = dataclasses.replace(artifact, path=tmp_path / "copy" / artifact.path.name)

    def shift(graph, source, name):
        graph.node.append(
            helper.make_node("Add" if name == "boxes" else "Identity", [source, "by"][: 1 + (name == "boxes")], [name])
        )

    def change(graph):
        by = np.zeros((10, 4), np.float32)
        by[3] = 25
        graph.initializer.append(numpy_helper.from_array(by, "by"))
        rewired(graph, shift)

    edit(artifact, change)
    verdict = VerifyArtifact("onnx", min_snr_db=5.0, min_total_db=5.0).run(
        artifact, program, program, Context(tmp_path)
    )
    assert not verdict.passed
    assert "144 of 160, 16 lost, 16 invented" in verdict.summary


class Log(nn.Module):
    def forward(self, x):
        return (x * x + 1e-10).log()


def test_an_epsilon_that_vanished_is_found_on_zeros(tmp_path):
    from onnx import numpy_helper

    artifact, program = lowered(Log(), [TensorSpec("x", "f32", (1, 8))], tmp_path)

    def without_epsilon(graph):
        for item in graph.initializer:
            if np.allclose(numpy_helper.to_array(item), 1e-10, rtol=1e-3, atol=0):
                item.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(item)), item.name))
        for node in graph.node:
            if node.op_type == "Constant":
                value = numpy_helper.to_array(node.attribute[0].t)
                if value.size == 1 and 0 < abs(value) < 1e-9:
                    node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.zeros_like(value)))

    edit(artifact, without_epsilon)
    verdict = VerifyArtifact("onnx").run(artifact, program, program, Context(tmp_path))
    assert not verdict.passed
    assert "output on zeros: NaN or infinity" in verdict.summary


class Memory(nn.Module):
    """A state that forgets slowly: an error in it adds up."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x, state):
        new = 0.95 * state + 0.05 * self.line(x)
        return new.tanh(), new


def test_states_are_fed_back(tmp_path):
    from onnx import helper, numpy_helper

    specs = [TensorSpec("x", "f32", (1, 8)), TensorSpec("state", "f32", (1, 8))]
    artifact, program = lowered(Memory().eval(), specs, tmp_path, ["y", "stateN"])
    verdict = VerifyArtifact("onnx").run(artifact, program, program, Context(tmp_path))
    assert verdict.passed
    assert "9 kinds of probes" in verdict.summary, "eight kinds, and the sequence"

    def drift(graph):
        graph.initializer.append(numpy_helper.from_array(np.array(1e-5, np.float32), "drift"))
        for node in graph.node:
            node.output[:] = ["before" if item == "stateN" else item for item in node.output]
            node.input[:] = ["before" if item == "stateN" else item for item in node.input]
        graph.node.append(helper.make_node("Add", ["before", "drift"], ["stateN"]))

    edit(artifact, drift)
    limits = {"min_snr_db": 80.0}
    found = VerifyArtifact("onnx", **limits).run(artifact, program, program, Context(tmp_path))
    assert not found.passed
    assert "on 32 steps with states fed back" in found.summary


def test_what_is_far_from_the_original_is_marked(tmp_path):
    """Two bits were asked for: what they lose is no failure, but it is said."""
    torch.manual_seed(0)
    program = program_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)))
    encoded = {name: quantize_nearest(program.weights[name], Affine(2), name=name) for name in ("0.weight", "2.weight")}
    record = dataclasses.replace(program.record, encodings={name: item.encoding for name, item in encoded.items()})
    reference = saved(dataclasses.replace(program, encoded=encoded, record=record), tmp_path / "r")
    (tmp_path / "out").mkdir()
    artifact = TorchToOnnx().run(reference, Context(tmp_path / "out"))
    original = saved(program, tmp_path / "o")
    verdict = VerifyArtifact("onnx").run(artifact, reference, original, Context(tmp_path))
    assert verdict.passed, verdict.summary
    assert verdict.remark.startswith("far from the original")
    assert not VerifyArtifact("onnx", min_total_db=18.0).run(artifact, reference, original, Context(tmp_path)).passed


def test_what_calibration_saw_is_not_compared_on(case, tmp_path):
    given = data_of(40, tmp_path)
    verdict = case.verify(data=given, calibration=given)
    assert verdict.summary.endswith("16 inputs (8 given, 8 generated) and 8 kinds of probes")


@pytest.mark.parametrize(("arithmetic", "limit"), [("dynamic", 12), ("f16", 30)])
def test_a_small_slice_is_held_to_what_dynamic_activations_leave_of_it(arithmetic, limit):
    """The reference rounds no activations: what is lost to it in a slice is what is lost to the original."""
    draw = np.random.default_rng(0)
    size = np.repeat([1.0, 0.05], 32)
    kind = Kind()
    for _ in range(8):
        wanted = (size * draw.standard_normal((1, 64))).astype(np.float32)
        noise = 0.05 * 10 ** (-15 / 20) * draw.standard_normal((1, 64))
        kind.lowering.add({"y": wanted}, {"y": (wanted + noise).astype(np.float32)})
    trial = SimpleNamespace(arithmetic=arithmetic, static=False, halves=False)
    (found,) = _near(trial, GIVEN, kind, Scales(), MIN_SNR_DB[arithmetic])
    assert found.where == "[:, 32..63]"
    assert (found.limit_db, found.passed) == (limit, limit == 12)
