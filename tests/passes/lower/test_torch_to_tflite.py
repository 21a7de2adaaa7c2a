from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.core.choice import Choice
from edgeship.core.model import Source, TensorSpec
from edgeship.core.passes import Skip
from edgeship.core.profile import DataRef, Profile, Request
from edgeship.core.target import Fact, Target
from edgeship.core.weights import Affine, Float, same_numbers
from edgeship.errors import EncodingError, LoweringError, UnsupportedOpError
from edgeship.passes.lower.torch_to_tflite import TorchToTFLite
from edgeship.runtimes.litert.runtime import RUNTIME

GROUP = Affine(4, granularity="group", group_size=32)


# Each weight takes the next of these that LiteRT holds; two mixes give every kind of layer several encodings.
MIXES = {
    "mostly int8": (Affine(8), Float(16), Affine(4), Affine(8, granularity="tensor"), Affine(8)),
    "mostly small": (Affine(4), Affine(3), Affine(2), Affine(4), Affine(8), Affine(3)),
    "groups": (GROUP, Affine(8), Affine(4), Affine(8), GROUP),
}


def _mixed(program, name, mode):
    turns = itertools.cycle(MIXES[name])
    encoded = {}
    for use in program.record.inventory.weights:
        if use.op == "other":
            continue
        encoding = next(turns)
        while RUNTIME.holds(use.op, encoding, mode):
            encoding = next(turns)
        weight = program.weight(use.name)
        if isinstance(encoding, Float):
            encoded[use.name] = to_float16(weight)
        else:
            encoded[use.name] = quantize_nearest(weight, encoding, axis=use.channel_axis)
    return encoded


@pytest.fixture(scope="module", params=["mostly int8", "mostly small"])
def mixed(request, layers_program, with_encoded):
    return with_encoded(layers_program, _mixed(layers_program, request.param, "float"))


def _snr_db(want, have):
    noise = float(((want.astype(np.float64) - have) ** 2).mean())
    return 10 * np.log10(float((want.astype(np.float64) ** 2).mean()) / max(noise, 1e-300))


def _run(artifact, program):
    feeds = dict(zip(("x", "ids"), (value.numpy() for value in program.example_inputs()), strict=True))
    with RUNTIME.open(artifact) as session:
        return session.run(feeds)


def _reference(program):
    import torch

    with torch.no_grad():
        outputs = program.module()(*program.example_inputs())
    return {spec.name: value.numpy() for spec, value in zip(program.signature.outputs, outputs, strict=True)}


def test_float32_answers_as_the_reference_does(layers_program, lower_to_tflite):
    want, have = _reference(layers_program), _run(lower_to_tflite(layers_program), layers_program)
    assert list(have) == ["image", "text"]
    for name, value in want.items():
        assert have[name].shape == value.shape
        assert _snr_db(value, have[name]) > 110, name


def test_encoded_weights_are_stored_exactly_and_answer_as_the_reference_does(mixed, lower_to_tflite):
    artifact = lower_to_tflite(mixed)
    want, have = _reference(mixed), _run(artifact, mixed)
    for name, value in want.items():
        assert _snr_db(value, have[name]) > 110, name
    stored = RUNTIME.read_weights(artifact)
    assert len(mixed.encoded) == 9
    for name, tensor in mixed.encoded.items():
        container = RUNTIME.container_bits("linear", tensor.encoding)
        assert same_numbers(tensor, stored[name], container_bits=container) == "", name
        # Three bits lie in four, which is a difference unless it is expected.
        assert bool(same_numbers(tensor, stored[name])) == (tensor.encoding == Affine(3)), name


@pytest.mark.parametrize("mix", ["mostly int8", "groups"])
def test_dynamic_activations_store_the_same_integers(layers_program, with_encoded, lower_to_tflite, mix):
    program = with_encoded(layers_program, _mixed(layers_program, mix, "dynamic"))
    artifact = lower_to_tflite(program, "dynamic")
    want, have = _reference(program), _run(artifact, program)
    for name, value in want.items():
        # One int8 rounding of activations a layer: far from exact, and far from wrong.
        assert 25 < _snr_db(value, have[name]) < 90, name
    stored = RUNTIME.read_weights(artifact)
    for name, tensor in program.encoded.items():
        assert same_numbers(tensor, stored[name]) == "", name
    assert artifact.compute == "int"


def test_integer_weights_stay_small_and_leave_no_rearranging(layers_program, mixed, lower_to_tflite):
    plain, small = lower_to_tflite(layers_program), lower_to_tflite(mixed)
    # Inputs, the flattened image and the wave: none of these is a weight's.
    assert plain.facts["transposes"] == small.facts["transposes"]
    assert int(plain.facts["transposes"]) <= 6
    saved = sum(4 * math.prod(tensor.shape) - tensor.stored_bytes for tensor in mixed.encoded.values())
    assert plain.path.stat().st_size - small.path.stat().st_size > 0.9 * saved


def test_the_same_bytes_every_time(mixed, lower_to_tflite, tmp_path):
    first, second = lower_to_tflite(mixed), lower_to_tflite(mixed, folder=tmp_path / "again")
    assert first.path != second.path
    assert first.path.read_bytes() == second.path.read_bytes()


def test_token_ids_become_int32_under_the_same_names(layers_program, lower_to_tflite):
    signature = lower_to_tflite(layers_program).signature
    assert [str(spec) for spec in signature.inputs] == ["x:f32[1,3,16,16]", "ids:i32[1,5]"]
    assert [spec.name for spec in signature.outputs] == ["image", "text"]


def test_groups_cannot_be_dequantized(layers_program, with_encoded, lower_to_tflite):
    encoded = {"first.weight": quantize_nearest(layers_program.weight("first.weight"), GROUP)}
    with pytest.raises(EncodingError, match=r"first\.weight.*per-channel"):
        lower_to_tflite(with_encoded(layers_program, encoded))


def test_zero_points_are_refused(layers_program, with_encoded, lower_to_tflite):
    asymmetric = quantize_nearest(layers_program.weight("first.weight"), Affine(8, symmetric=False))
    with pytest.raises(EncodingError, match=r"zero points of first\.weight"):
        lower_to_tflite(with_encoded(layers_program, {"first.weight": asymmetric}))


def test_a_weight_that_nothing_uses_is_named(layers_program, with_encoded, lower_to_tflite):
    stray = quantize_nearest(layers_program.weight("first.weight"), Affine(8))
    with pytest.raises(LoweringError, match=r"gone\.weight"):
        lower_to_tflite(with_encoded(layers_program, {"gone.weight": stray}))


def test_an_operator_without_a_form_is_named(lower_to_tflite):
    import torch

    from edgeship.program.export import make_program

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.digamma(x + 2)

    program = make_program(Odd(), [TensorSpec("x", "f32", (4,))], [torch.rand(4)])
    with pytest.raises(UnsupportedOpError, match=r"aten\.digamma.*digamma"):
        lower_to_tflite(program)


def test_topk_and_sort_run(lower_to_tflite):
    import torch

    from edgeship.program.export import make_program

    class Ranks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values, places = x.topk(3, dim=0)
            low, _ = x.topk(2, largest=False)
            return values, places, low, x.sort(-1)[0]

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    program = make_program(Ranks(), [TensorSpec("x", "f32", (5, 6))], [x])
    with RUNTIME.open(lower_to_tflite(program)) as session:
        have = session.run({"x": x.numpy()})
    for want, value in zip(Ranks()(x), have.values(), strict=True):
        assert np.array_equal(want.numpy(), value)


def _request(runtime, activations):
    fact = Fact(("tflite",), "a source for tests")
    target = Target("host", "Host", fact, fact, fact, fact, fact)
    signature = None
    source = Source(path=None, signature=signature)  # type: ignore[arg-type]
    profile = Profile("p", "for tests", Choice("int8", activations))
    # Without data nothing is static in 8 bits.
    return Request(source, target, runtime, profile, calibration=DataRef("data.npz", "0"))


def test_plan_takes_the_activations_of_the_profile():
    for mode in ("float", "dynamic", "int8", "int16"):
        assert TorchToTFLite.plan(_request("tflite", mode)) == TorchToTFLite(activations=mode)
    other = TorchToTFLite.plan(_request("onnx", "float"))
    assert isinstance(other, Skip)
    assert other.reason == "only for runtime tflite"
