"""The roofline estimate: what it may never do, and that it says what it is."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.records import read_toml
from edgeship.core.registry import runtimes
from edgeship.core.target import Fact, Target
from edgeship.devices.estimate import BAND, estimate

TARGETS = {
    path.stem: read_toml(Target, path) for path in sorted((Path(__file__).parents[2] / "targets").glob("*.toml"))
}
FLOAT = Choice("float16", "float")


def model(macs: int = 10**9, elements: int = 10**6, weight: int = 10**6) -> Inventory:
    uses = (WeightUse("w", "linear", (weight,)), WeightUse("b", "other", (64,)))
    ops = (
        OpCost("linear", "aten.linear", macs, elements, elements, ("w", "b")),
        OpCost("view", "aten.view", 0, elements, elements),
        OpCost("relu", "aten.relu", 0, elements, elements),
    )
    return Inventory(uses, ops, 2 * elements)


def with_bandwidth(target: Target, bytes_s: float) -> Target:
    return replace(target, bandwidth_bytes_s=Fact(bytes_s, "a test's own figure", "derived"))


sizes = st.integers(1, 10**9)
targets = st.sampled_from(sorted(TARGETS))
choices = st.sampled_from(
    [Choice(weights, mode) for weights in ("float16", "int8") for mode in ("float", "int8", "int16", "dynamic")]
)


@given(name=targets, choice=choices, macs=st.integers(0, 10**12), elements=sizes, weight=sizes)
def test_never_faster_than_memory_or_the_peak_allow(name, choice, macs, elements, weight):
    target = TARGETS[name]
    for runtime in target.runtime_names:
        found = estimate(model(macs, elements, weight), target, runtime, choice)
        if found.value is None:
            continue
        stored = weight * (2 if choice.weights == "float16" else 1)
        from_memory = 1e3 * stored / target.bandwidth_bytes_s.value
        best = max(fact.value for fact in target.peak_ops_s.values())
        assert found.value >= from_memory
        assert found.low >= from_memory
        assert found.value >= 1e3 * 2 * macs / best
        assert found.low <= found.value <= found.high


@given(name=targets, choice=choices, macs=sizes, more=st.integers(0, 10**12))
def test_more_arithmetic_never_takes_less_time(name, choice, macs, more):
    target = TARGETS[name]
    for runtime in target.runtime_names:
        less, greater = (estimate(model(n), target, runtime, choice).value for n in (macs, macs + more))
        assert (less is None and greater is None) or less <= greater


@given(choice=choices, weight=sizes, elements=sizes, slow=st.floats(1e9, 1e11), factor=st.floats(1, 100))
def test_more_bandwidth_never_takes_more_time(choice, weight, elements, slow, factor):
    target = TARGETS["galaxy-s24"]
    found = [
        estimate(model(elements=elements, weight=weight), with_bandwidth(target, rate), "qnn", choice).value
        for rate in (slow, slow * factor)
    ]
    assert found[0] >= found[1]


def test_bandwidth_counts_when_memory_is_the_limit():
    target, heavy = TARGETS["galaxy-s24"], model(macs=1, weight=10**9)
    slow, fast = (estimate(heavy, with_bandwidth(target, rate), "qnn", FLOAT).value for rate in (10e9, 20e9))
    assert slow / fast == pytest.approx(2, rel=0.01)


def test_arithmetic_counts_when_it_is_the_limit():
    target = TARGETS["galaxy-s24"]
    once, twice = (estimate(model(macs=n), target, "qnn", FLOAT).value for n in (10**12, 2 * 10**12))
    assert twice / once == pytest.approx(2, rel=0.01)


def test_eight_bit_arithmetic_is_faster_where_the_unit_has_it():
    busy = model(macs=10**11)
    for runtime in ("coreml", "onnx", "tflite"):
        target = TARGETS["iphone15pro"]
        int8, plain = (
            estimate(busy, target, runtime, choice).value
            for choice in (Choice("int8", "int8"), Choice("int8", "float"))
        )
        assert int8 < plain


def test_weights_as_stored_replace_what_the_profile_says():
    heavy = model(macs=1, weight=10**9)
    small = estimate(heavy, TARGETS["galaxy-s24"], "qnn", FLOAT, {"w": 10**8})
    assert small.value < estimate(heavy, TARGETS["galaxy-s24"], "qnn", FLOAT).value / 10


def test_a_cpu_reads_the_weights_of_a_float_model_in_float32():
    heavy, target = model(macs=1, weight=10**9), TARGETS["pixel8"]
    plain, dynamic = (
        estimate(heavy, target, "tflite", choice).value
        for choice in (Choice("int8", "float"), Choice("int8", "dynamic"))
    )
    assert plain / dynamic == pytest.approx(4, rel=0.02)


def test_views_cost_nothing_and_lookups_read_only_their_rows():
    table = (WeightUse("table", "embedding", (10**9,)),)
    lookup = Inventory(table, (OpCost("embedding", "aten.embedding", 0, 64, 64 * 128, ("table",)),), 64 * 128)
    view = Inventory((), (OpCost("view", "aten.view", 0, 10**9, 10**9),), 10**9)
    empty_ms = 1e3 * runtimes()["onnx"].engine.roofline.run_seconds
    assert estimate(view, TARGETS["pixel8"], "onnx", FLOAT).value == pytest.approx(empty_ms)
    found = estimate(lookup, TARGETS["pixel8"], "onnx", FLOAT)
    assert found.low <= found.value < 2 * empty_ms


def test_says_that_it_is_an_estimate_and_how_far_off_it_may_be():
    found = estimate(model(macs=10**11), TARGETS["iphone15pro"], "coreml", FLOAT)
    assert (found.how, found.unit, found.device, found.runtime) == ("estimated", "ms", "iphone15pro", "coreml")
    assert found.high == pytest.approx(BAND * found.value)
    assert "not fitted" in found.note
    assert found.runs == 0


def test_what_cannot_be_estimated_has_a_reason_and_no_figure():
    elsewhere = estimate(model(), TARGETS["iphone15pro"], "qnn", FLOAT)
    assert elsewhere.value is None
    assert "qnn does not run on iPhone 15 Pro" in elsewhere.note
    without = estimate(model(), TARGETS["dragonwing-iq9075"], "onnx", FLOAT)
    assert without.value is None
    assert "cpu.f32" in without.note


@pytest.mark.parametrize(
    ("choice", "published_ms"),
    [(Choice("float16", "float"), 1.38), (Choice("int8", "float"), 1.50), (Choice("int8", "int8"), 0.77)],
)
def test_resnet50_on_a17_pro_is_within_the_band_of_what_apple_publishes(choice, published_ms):
    # Core ML Tools guide, quantization performance: ResNet-50 at 224 px, 4.09e9 MACs and 25.6e6 weights.
    layers = 53
    uses = tuple(WeightUse(f"w{i}", "conv", (25_600_000 // layers,)) for i in range(layers))
    ops = tuple(
        OpCost(f"conv{i}", "aten.conv2d", 4_090_000_000 // layers, 200_000, 200_000, (f"w{i}",)) for i in range(layers)
    )
    found = estimate(Inventory(uses, ops, 10**6), TARGETS["iphone15pro"], "coreml", choice)
    assert found.low <= published_ms <= found.high


def test_needs_no_library_beyond_python():
    code = "import sys, edgeship.devices.estimate; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
