"""compress/allocate: within the bytes, less loss than one width for all, and a curve that never rises."""

import dataclasses
import json
import re

import pytest

from edgeship.core.encodings import encoding_named
from edgeship.core.passes import Context, Skip
from edgeship.core.planning import rounding_method
from edgeship.core.registry import runtimes
from edgeship.core.units import parse_bytes
from edgeship.errors import GateError
from edgeship.passes.compress.allocate import AllocateBits
from edgeship.passes.compress.quantize import QuantizeWeights
from edgeship.passes.compress.sensitivity import LOSSES, MeasureSensitivity
from edgeship.program.program import TorchProgram, read_record


def uniform_bytes(record, name):
    runtime = runtimes()["onnx"]
    uses = [use for use in record.inventory.weights if use.op != "other"]
    return sum(-(-runtime.stored_bits(use, encoding_named(name)) // 8) for use in uses)


@pytest.fixture(scope="module")
def request_auto(request_for, calibration):
    return request_for(profile="auto", calibration=calibration)


@pytest.fixture(scope="module")
def planned(request_auto):
    return AllocateBits.plan(request_auto)


@pytest.fixture(scope="module")
def measured(request_auto, saved, tmp_path_factory):
    """The model with the losses of its layers beside it, rounded by GPTQ."""
    step = dataclasses.replace(MeasureSensitivity.plan(request_auto), samples=16)
    assert step.method == "gptq"
    return step.run(saved, Context(tmp_path_factory.mktemp("measured")))


def test_other_profiles_decide_themselves(request_for):
    assert isinstance(AllocateBits.plan(request_for()), Skip)
    assert isinstance(MeasureSensitivity.plan(request_for()), Skip)


def test_losses_are_those_of_the_method_that_rounds_and_fall_with_bits(measured, request_auto, saved, tmp_path):
    losses = json.loads((measured.path / LOSSES).read_text())
    names = {use.name for use in read_record(saved).inventory.weights if use.op != "other"}
    assert set(losses) == names
    for name in names:
        assert losses[name]["float16"] < losses[name]["int8"] < losses[name]["int4"] < losses[name]["int2"]
    plain = dataclasses.replace(MeasureSensitivity.plan(request_auto), method="nearest", samples=16)
    nearest = json.loads((plain.run(saved, Context(tmp_path)).path / LOSSES).read_text())
    assert sum(losses[name]["int2"] for name in names) < 0.8 * sum(nearest[name]["int2"] for name in names)


def test_the_method_is_the_one_that_quantize_will_use(request_for, calibration):
    for options in ({}, {"compress/quantize": {"method": "awq"}}, {"compress/finetune": {"steps": 5}}):
        for data in (calibration, None):
            request = request_for(profile="auto", calibration=data, options=options)
            assert MeasureSensitivity.plan(request).method == rounding_method(request)
            if "compress/quantize" not in options:
                assert QuantizeWeights.plan(request).method == rounding_method(request)


def test_candidates_are_what_the_runtime_holds(planned, request_for):
    assert "palette4-c8" not in dict(planned.candidates)["linear"]
    coreml = AllocateBits.plan(request_for("coreml", "auto"))
    assert set(dict(coreml.candidates)["conv"]) >= {"float16", "int8"}


def test_the_choice_fits_and_loses_least_of_the_curve(planned, measured, saved, tmp_path):
    record = read_record(saved)
    budget = uniform_bytes(record, "int4") * 5 // 4
    made = read_record(dataclasses.replace(planned, max_bytes=budget).run(measured, Context(tmp_path)))
    assert set(made.assignment) == {use.name for use in record.inventory.weights if use.op != "other"}
    runtime = runtimes()["onnx"]
    uses = {use.name: use for use in record.inventory.weights}
    total = sum(-(-runtime.stored_bits(uses[name], item) // 8) for name, item in made.assignment.items())
    assert total <= budget
    sizes, losses = zip(*made.curve, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(losses) == sorted(losses, reverse=True)
    assert len({item.bits for item in made.assignment.values()}) > 1


def test_with_a_quarter_more_bytes_than_four_bits_it_loses_less(planned, measured, saved, calibration, tmp_path):
    import numpy as np
    import torch

    budget = uniform_bytes(read_record(saved), "int4") * 5 // 4
    allocated = dataclasses.replace(planned, max_bytes=budget).run(measured, Context(tmp_path))
    # Others than GPTQ saw, drawn alike.
    sizes = np.array([0.2, 1.0, 3.0, 0.5]).reshape(1, 4, 1, 1)
    drawn = np.random.default_rng(1).standard_normal((48, 1, 4, 8, 8)) * sizes
    images = torch.from_numpy(drawn.astype(np.float32))
    plain = TorchProgram.open(saved).module()
    noise = {}
    for name, step, model in (
        ("auto", QuantizeWeights(form="auto", bits=0, method="gptq", data=calibration), allocated),
        ("uniform", QuantizeWeights(bits=4, method="gptq", data=calibration), saved),
    ):
        folder = tmp_path / name
        folder.mkdir()
        module = TorchProgram.open(step.run(model, Context(folder))).module()
        noise[name] = sum(float((module(x)[0] - plain(x)[0]).square().sum()) for x in images)
    assert noise["auto"] < 0.7 * noise["uniform"]


def test_a_budget_that_nothing_fits_says_the_smallest_that_would(planned, request_for):
    request = request_for(profile="auto", max_size_bytes=3000)
    with pytest.raises(GateError, match="no choice of encodings fits onnx into 3 kB") as error:
        AllocateBits.plan(request).confirm(request)
    found = re.fullmatch(r"--max-size (\S+) would fit", error.value.fix)
    changed = dataclasses.replace(request, max_size_bytes=parse_bytes(found[1]))
    AllocateBits.plan(changed).confirm(changed)


def test_a_budget_by_hand_gets_the_least_that_would(planned, request_for):
    request = request_for(profile="auto", options={"compress/allocate": {"max_bytes": 10}})
    with pytest.raises(GateError, match="max_bytes=10") as error:
        dataclasses.replace(planned, max_bytes=10).confirm(request)
    least = int(re.fullmatch(r"--set compress/allocate.max_bytes=(\d+) would fit", error.value.fix)[1])
    dataclasses.replace(planned, max_bytes=least).confirm(request)
    with pytest.raises(GateError):
        dataclasses.replace(planned, max_bytes=least - 1).confirm(request)


def test_no_size_is_proposed_where_memory_is_what_lacks(request_for):
    request = request_for(profile="auto")
    target = request.target
    tight = dataclasses.replace(target, app_memory_bytes=dataclasses.replace(target.app_memory_bytes, value=1000))
    for limit in (None, 3000):
        changed = dataclasses.replace(request, target=tight, max_size_bytes=limit)
        with pytest.raises(GateError, match=r"into the 1 kB of an app on") as error:
            AllocateBits.plan(changed).confirm(changed)
        assert error.value.fix == "choose a smaller model, or a larger target"


def test_the_size_that_is_proposed_builds(cli, tmp_path):
    """With the command's own words, down to the file on disk."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()\n"
    )
    order = ["build", "net.py:model", "--input", "x:f32[1,8,8]", "--target", "linux-x86", "--runtime", "onnx",
             "--profile", "auto", "--set", "compress/sensitivity.samples=2", "-o", "b"]  # fmt: skip
    ran = cli(*order, "--max-size", "1kB")
    assert ran.code == 1, ran.err
    (size,) = re.findall(r"--max-size (\S+) would fit", ran.errors[0])
    again = cli(*order, "--max-size", size)
    assert again.code == 0, again.err


def test_pruned_layers_are_counted_without_their_zeros(request_for, saved, calibration, tmp_path):
    from edgeship.passes.compress.prune import PruneWeights

    request = request_for("coreml", "auto", calibration=calibration, options={"compress/prune": {"sparsity": 0.6}})
    planned = dataclasses.replace(AllocateBits.plan(request), max_bytes=1 << 20)
    assert "linear" in planned.sparse

    def ran(step, model):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return step.run(model, Context(folder))

    pruned = ran(PruneWeights(sparsity=0.6, data=calibration), saved)
    model = ran(dataclasses.replace(MeasureSensitivity.plan(request), samples=4), pruned)
    (smallest, _), *_ = read_record(ran(planned, model)).curve
    (dense, _), *_ = read_record(ran(dataclasses.replace(planned, sparse=()), model)).curve
    assert smallest < dense
    tight = ran(dataclasses.replace(planned, max_bytes=smallest), model)
    stored = read_record(ran(QuantizeWeights.plan(request), tight))
    assert any(item.kind == "sparse" for item in stored.encodings.values())
    runtime, uses = runtimes()["coreml"], {use.name: use for use in stored.inventory.weights}
    bits = [runtime.stored_bits(uses[name], item, stored.pruned[name]) for name, item in stored.encodings.items()]
    assert sum(-(-count // 8) for count in bits) == smallest
