"""compress/allocate: within the bytes, less loss than one width for all, and a curve that never rises."""

import dataclasses

import pytest

from edgeship.core.encodings import encoding_named
from edgeship.core.passes import Context, Skip
from edgeship.core.registry import runtimes
from edgeship.errors import GateError
from edgeship.passes.compress.allocate import AllocateBits
from edgeship.passes.compress.quantize import QuantizeWeights
from edgeship.program.program import TorchProgram, read_record


def uniform_bytes(record, name):
    runtime = runtimes()["onnx"]
    uses = [use for use in record.inventory.weights if use.op != "other"]
    return sum(-(-runtime.stored_bits(use, encoding_named(name)) // 8) for use in uses)


@pytest.fixture(scope="module")
def planned(request_for, calibration):
    step = AllocateBits.plan(request_for(profile="auto", calibration=calibration))
    return dataclasses.replace(step, samples=16)


def test_other_profiles_decide_themselves(request_for):
    assert isinstance(AllocateBits.plan(request_for()), Skip)


def test_candidates_are_what_the_runtime_holds(planned, request_for):
    assert "palette4-c8" not in dict(planned.candidates)["linear"]
    coreml = AllocateBits.plan(request_for("coreml", "auto"))
    assert set(dict(coreml.candidates)["conv"]) >= {"float16", "int8"}


def test_the_choice_fits_and_loses_least_of_the_curve(planned, saved, tmp_path):
    record = read_record(saved)
    budget = uniform_bytes(record, "int4") * 5 // 4
    made = read_record(dataclasses.replace(planned, max_bytes=budget).run(saved, Context(tmp_path)))
    assert set(made.assignment) == {use.name for use in record.inventory.weights if use.op != "other"}
    runtime = runtimes()["onnx"]
    uses = {use.name: use for use in record.inventory.weights}
    total = sum(-(-runtime.stored_bits(uses[name], item) // 8) for name, item in made.assignment.items())
    assert total <= budget
    sizes, losses = zip(*made.curve, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(losses) == sorted(losses, reverse=True)
    assert len({item.bits for item in made.assignment.values()}) > 1


def test_at_the_bytes_of_four_bits_it_loses_no_more_than_four_bits(planned, saved, calibration, tmp_path):
    import numpy as np
    import torch

    budget = uniform_bytes(read_record(saved), "int4")
    allocated = dataclasses.replace(planned, max_bytes=budget).run(saved, Context(tmp_path))
    images = torch.from_numpy(np.load(calibration.reference)["image"][:, None])
    plain = TorchProgram.open(saved).module()
    noise = {}
    for name, step, model in (
        ("auto", QuantizeWeights(form="auto", bits=0, method="clipped"), allocated),
        ("uniform", QuantizeWeights(bits=4, method="clipped"), saved),
    ):
        folder = tmp_path / name
        folder.mkdir()
        module = TorchProgram.open(step.run(model, Context(folder))).module()
        noise[name] = sum(float((module(x)[0] - plain(x)[0]).square().sum()) for x in images)
    assert noise["auto"] <= noise["uniform"]


def test_a_budget_that_nothing_fits_says_the_smallest_that_would(planned, request_for):
    request = request_for(profile="auto", max_size_bytes=3000)
    with pytest.raises(GateError, match="no choice of encodings fits onnx into") as error:
        AllocateBits.plan(request).confirm(request)
    assert "the smallest takes about" in error.value.fix
