"""Profile fast takes the arithmetic that measured times of layers say is quickest for a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgeship.core import speed
from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.profile import DataRef, Profile, Request
from edgeship.core.registry import profiles, targets
from edgeship.engine.notes import notes_of


def inventory(*layers: tuple[str, str, int]) -> Inventory:
    """Layers as (operator, kind of weight, multiply-accumulates); 100 numbers come out of each."""
    weights, costs = [], []
    for number, (op, kind, macs) in enumerate(layers):
        name = f"w{number}"
        groups = 10 if kind == "depthwise_conv" else 2 if kind == "grouped" else 1
        if kind:
            use = {"grouped": "conv"}.get(kind, kind)
            shape = (10, 10) if use in ("linear", "embedding", "other") else (10, 10, 3, 3)
            weights.append(WeightUse(name, use, shape, groups=groups))  # type: ignore[arg-type]
        costs.append(OpCost(f"n{number}", op, macs, 100, 100, (name,) if kind else ()))
    return Inventory(tuple(weights), tuple(costs), 100)


@pytest.mark.parametrize(
    ("op", "weight", "kind"),
    [
        ("aten.conv2d", "conv", "conv"),
        ("aten.conv2d", "grouped", "grouped_conv"),
        ("aten.conv1d", "depthwise_conv", "depthwise_conv"),
        ("aten.linear", "linear", "linear"),
        ("aten.layer_norm", "other", "norm"),
        ("aten.silu", "", "silu"),
        ("aten.gelu", "", "gelu"),
        ("aten.hardswish", "", "hardswish"),
        ("aten.mish", "", "gelu"),
        ("aten.scaled_dot_product_attention", "", "attention"),
        ("aten.add.Tensor", "", "elementwise"),
        ("aten.sigmoid", "", "sigmoid"),
        ("aten.hardsigmoid", "", "hardsigmoid"),
        ("aten.mean.dim", "", "mean"),
        ("aten.cat", "", "join"),
        ("aten.reshape", "", ""),
        ("aten.embedding", "embedding", ""),
    ],
)
def test_operators_have_the_row_of_their_kind(op, weight, kind):
    made = inventory((op, weight, 1000))
    assert speed.kind_of(made.ops[0], {use.name: use for use in made.weights}) == kind
    one = dataclasses.replace(made.ops[0], elements_out=10)
    if kind == "linear":
        assert speed.kind_of(one, {use.name: use for use in made.weights}) == "linear_row"


@pytest.mark.parametrize(
    ("shape", "elements", "kind"),
    [((8, 4, 3, 3), 800, "conv"), ((8, 4, 1, 1), 800, "pointwise_conv"), ((8, 4, 1, 1), 8, "pixel_conv"),
     ((8, 4, 3), 800, "conv"), ((8, 4, 1), 8, "pixel_conv"), ((8, 4, 3, 3), 8, "conv")],
)  # fmt: skip
def test_convolutions_of_one_pixel_and_of_the_neighbours_are_kinds_of_their_own(shape, elements, kind):
    cost = OpCost("n", "aten.conv2d", 1000, 400, elements, ("w",))
    assert speed.kind_of(cost, {"w": WeightUse("w", "conv", shape)}) == kind


def test_numbers_read_and_written_count():
    """Dynamic activations are rounded number by number: few channels of a large image cost more than they save."""
    weights = (WeightUse("up", "conv", (72, 16, 1, 1)), WeightUse("deep", "conv", (576, 576, 1, 1)))
    wide = OpCost("n", "aten.conv2d", 56 * 56 * 16 * 72, 56 * 56 * 16, 56 * 56 * 72, ("up",))
    deep = OpCost("n", "aten.conv2d", 7 * 7 * 576 * 576, 7 * 7 * 576, 7 * 7 * 576, ("deep",))
    for cost, best in ((wide, "float"), (deep, "dynamic")):
        assert speed.quickest("tflite", Inventory(weights, (cost,) * 4, 0), "dynamic") == best


def test_the_quickest_is_chosen_and_no_coarser_one_for_nothing(monkeypatch):
    times: dict[str, Any] = {
        "r": {
            "conv": {"float": (0.0, 10.0, 0.0), "dynamic": (0.0, 8.0, 0.0), "int8": (500.0, 2.0, 0.0)},
            "linear": {"float": (0.0, 10.0, 0.0), "dynamic": (0.0, 2.0, 0.0), "int8": (0.0, 1.95, 0.0)},
            "norm": {"float": (0.0, 0.0, 1.0), "dynamic": (0.0, 0.0, 1.0), "int8": (0.0, 0.0, 50.0)},
        }
    }
    monkeypatch.setattr(speed, "_times", lambda: times)
    convolutions = inventory(("aten.conv2d", "conv", 10**8))
    assert speed.quickest("r", convolutions, "int8") == "int8"
    assert speed.quickest("r", convolutions, "dynamic") == "dynamic"
    assert speed.quickest("r", convolutions, "float") == "float"
    # A twentieth is not worth another rounding.
    assert speed.quickest("r", inventory(("aten.linear", "linear", 10**8)), "int8") == "dynamic"
    assert speed.quickest("r", inventory(("aten.conv2d", "conv", 10**7), ("aten.layer_norm", "", 0)), "int8") == "int8"
    assert speed.quickest("other", convolutions, "int8") == "int8"
    assert speed.quickest("r", convolutions, "int16") == "int16"
    assert speed.predicted("r", convolutions, "int8") == pytest.approx(500 / 1e6 + 2.0 * 10**8 / 1e9)
    norms = inventory(("aten.layer_norm", "", 0))
    # 100 numbers are read and 100 written.
    assert speed.predicted("r", norms, "int8") == pytest.approx(50 * 200 / 1e9)


def test_a_tiny_model_stays_in_float(monkeypatch):
    """What a layer takes whatever its size decides there, and nothing is gained by a few microseconds."""
    times: dict[str, Any] = {
        "r": {"conv": {"float": (0.0, 10.0, 0.0), "dynamic": (0.0, 8.0, 0.0), "int8": (500.0, 2.0, 0.0)}}
    }
    monkeypatch.setattr(speed, "_times", lambda: times)
    tiny = inventory(("aten.conv2d", "conv", 10**4))
    assert speed.quickest("r", tiny, "int8") == speed.quickest("r", tiny, "dynamic") == "float"
    assert speed.slower("r", tiny, "int8") == pytest.approx((520 / 1e6, 100 / 1e6))
    assert speed.slower("r", tiny, "dynamic") is None
    assert speed.slower("r", tiny, "int16") is None
    assert speed.slower("other", tiny, "int8") is None


def request(profile: Profile, runtime: str, made: Inventory | None, data: bool) -> Request:
    from edgeship.core.model import Source

    given = DataRef("data.npz", "0") if data else None
    return Request(Source(Path("m.py"), (), reference="m.py:f"), targets()["linux-x86"], runtime, profile, made, given)


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_fast_is_static_for_convolutions_with_data_and_never_static_without(runtime):
    fast = profiles()["fast"]
    convolutions = inventory(("aten.conv2d", "conv", 10**9))
    wanted = request(fast, runtime, convolutions, True).choice.activations
    # LiteRT's dynamic kernels are as quick as its static ones for a convolution alone.
    assert wanted == "int8" or (runtime, wanted) == ("tflite", "dynamic")
    assert speed.predicted(runtime, convolutions, wanted) < 1.06 * speed.predicted(runtime, convolutions, "int8")
    assert request(fast, runtime, convolutions, False).choice.activations in ("dynamic", "float")
    # Depthwise convolutions alone: static or float, and never kernels that are slower than float.
    deep = inventory(("aten.conv2d", "depthwise_conv", 10**9))
    chosen = request(fast, runtime, deep, True).choice.activations
    assert speed.predicted(runtime, deep, chosen) <= speed.predicted(runtime, deep, "float")


def test_a_profile_that_does_not_ask_for_the_quickest_gets_what_it_says():
    own = Profile("own", "", Choice("int8", "int8"))
    deep = inventory(("aten.layer_norm", "", 0))
    assert request(own, "tflite", deep, True).choice.activations == "int8"


def test_every_row_of_the_table_has_every_arithmetic():
    for rates in speed._times().values():
        assert set(rates) >= {"conv", "depthwise_conv", "grouped_conv", "linear", "linear_row", "norm", "attention"}
        assert set(rates) >= {
            "silu",
            "hardswish",
            "gelu",
            "elementwise",
            "pointwise_conv",
            "pixel_conv",
            "mean",
        }
        for row in rates.values():
            assert set(row) == set(speed.MODES)
            assert all(min(times) >= 0 for times in row.values())
            # What is always fused into its neighbours takes nothing of its own.
            assert any(max(times) > 0 for times in row.values())


def test_a_profile_that_is_slower_than_float_is_told_so():
    """LiteRT computes norms and the error function in static 8 bits by its reference kernels."""
    own = Profile("own", "", Choice("int8", "int8"))
    deep = dataclasses.replace(inventory(("aten.gelu", "", 0)), ops=(OpCost("n", "aten.gelu", 0, 10**6, 10**6),))
    (told,) = notes_of([request(own, "tflite", deep, True)], [], [])
    assert told.startswith("tflite: with activations static in 8 bits this model is slower than in float")
    assert notes_of([request(Profile("own", "", Choice("int8")), "tflite", deep, True)], [], []) == ()
