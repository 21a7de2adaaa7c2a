"""What Python takes: names in every form, typed limits, and one clear line for what is none of them."""

from pathlib import Path

import numpy as np
import pytest

from edgeship.api.orders import make_order
from edgeship.errors import EdgeshipError


@pytest.mark.parametrize("given", ["pixel9,iphone15pro", ["pixel9", "iphone15pro"], ("pixel9 , iphone15pro",)])
@pytest.mark.parametrize("name", ["target", "targets"])
def test_targets_in_every_form(name, given):
    assert make_order("m.onnx", **{name: given}).targets == ("pixel9", "iphone15pro")


def test_one_target_is_one_target():
    assert make_order("m.onnx", targets="pixel9", runtimes="tflite").targets == ("pixel9",)
    assert make_order("m.onnx", targets="pixel9", runtimes="tflite").runtimes == ("tflite",)


def test_limits_are_numbers_or_words():
    for size in ("3MB", 3_000_000, 3e6):
        assert make_order("m.onnx", max_size=size).max_size_bytes == 3_000_000
    for drop in ("1%", 0.01, "0.01"):
        assert make_order("m.onnx", max_drop=drop).max_drop == pytest.approx(0.01)
    assert make_order("m.onnx", max_drop=0).max_drop == 0


def test_one_setting_is_a_list_of_one():
    from edgeship import Quantize

    assert make_order("m.onnx", passes=Quantize(bits=4)).options == {"compress/quantize": {"bits": 4}}


def test_progress_is_a_function():
    from edgeship import build

    with pytest.raises(EdgeshipError, match="progress is a int, not a function; give one such as print"):
        build("m.onnx", target="pixel9", progress=3)


def test_paths_and_tables():
    order = make_order(
        Path("m.onnx"), output=Path("out"), profile=Path("mine.toml"), adapters={"a": Path("dir")}, lora=Path("l"),
        input_names={"x": "image"}, calibration=Path("d.npz"), eval="e.npz",
    )  # fmt: skip
    assert (order.source, order.bundle, order.profile) == ("m.onnx", Path("out"), "mine.toml")
    assert (order.adapters, order.lora, order.renames) == (("a=dir",), "l", ("x=image",))
    assert (order.calibration, order.evaluation) == ("d.npz", "e.npz")


@pytest.mark.parametrize(
    ("inputs", "texts"),
    [
        (None, ()),
        ("x:f32[1,2]", ("x:f32[1,2]",)),
        (["x:f32[1,2]", "n=3"], ("x:f32[1,2]", "n=3")),
        ({"x": "f32[1,2]", "n": 3, "s": [1, 2], "on": True}, ("x:f32[1,2]", "n=3", "s=[1, 2]", "on=true")),
        ({"x": np.zeros((1, 2)), "ids": np.zeros((1, 3), int)}, ("x:f32[1,2]", "ids:i64[1,3]")),
        ({"x": np.zeros((1, 2), np.float16), "b": np.zeros(4, np.uint8)}, ("x:f32[1,2]", "b:u8[4]")),
        ({"serving x:0": np.zeros((1, 2), "f")}, ('"serving x:0":f32[1,2]',)),
    ],
)
def test_inputs_of_a_file(inputs, texts):
    from edgeship.data.specs import split_inputs

    order = make_order("m.onnx", inputs)
    specs, fixed = split_inputs(order.inputs)
    wanted, held = split_inputs(texts)
    assert (specs, fixed) == (wanted, held)


@pytest.mark.parametrize(
    ("model", "inputs", "said", "says"),
    [
        (3, None, {}, "int is not a model; give an nn.Module"),
        ("m.onnx", None, {"taget": "pixel9"}, "there is no argument taget; did you mean target?"),
        ("m.onnx", None, {"target": "a", "targets": "b"}, "target and targets are the same; give one of them"),
        ("m.onnx", None, {"target": 3}, "--target takes a name or a list of names, not 3"),
        ("m.onnx", None, {"targets": ""}, "--target is empty"),
        ("m.onnx", None, {"max_size": ""}, "--max-size is empty"),
        ("m.onnx", None, {"output": " "}, "--output is empty"),
        ("m.onnx", None, {"max_size": "3 apples"}, "'3 apples' is not a size"),
        ("m.onnx", None, {"max_drop": 2.0}, "is not a share"),
        ("m.onnx", None, {"max_drop": -0.1}, "is not a share"),
        ("m.onnx", None, {"context": "64"}, "--context '64' is not a whole number"),
        ("m.onnx", None, {"kv_cache": "int4"}, "--kv-cache 'int4' is not one of float32, float16, int8"),
        ("m.onnx", None, {"activations": "int4"}, "--activations 'int4' is not one of float, int8, int16, dynamic"),
        ("m.onnx", None, {"weights": "int9"}, "int9"),
        ("m.onnx", None, {"weights": 8}, "--weights 8 is not the name of an encoding"),
        ("m.onnx", None, {"output": 3}, "3 is not a path"),
        ("m.onnx", None, {"trust": "no"}, "trust takes True or False, not 'no'"),
        ("m.onnx", None, {"all_or_nothing": 0}, "all_or_nothing takes True or False, not 0"),
        ("m.onnx", None, {"max_size": True}, "max_size takes bytes, or text such as"),
        ("m.onnx", None, {"max_drop": [1]}, "max_drop takes a share"),
        ("m.onnx", None, {"input_names": 3}, "input_names takes a dict"),
        ("m.onnx", None, {"input_names": [3]}, "--input-name takes a name or a list of names, not [3]"),
        ("m.onnx", None, {"options": 3}, "options takes a dict such as"),
        ("m.onnx", None, {"options": {3: {}}}, 'no pass "3"'),
        ("m.onnx", None, {"passes": 3}, "passes takes a list such as"),
        ("m.onnx", None, {"weights": "auto"}, "give --profile auto"),
        ("m.onnx", None, {"metric": len}, "metric is a builtin_function_or_method, not a name"),
        ("m.onnx", None, {"passes": ["compress/quantize.bits=4"]}, "is not a setting of a pass"),
        ("m.onnx", None, {"tokenizer": object()}, "tokenizer belongs to a model in memory"),
        ("m.onnx", [np.zeros(3)], {}, "the inputs of a file need names"),
        ("m.onnx", {"x": object()}, {}, "the input x is of type object"),
        ("m.onnx", {"x": np.zeros(2, complex)}, {}, "the input x holds complex128, which no artifact takes"),
        ("m.onnx", None, {"calibration": []}, "calibration holds no samples"),
        ("m.onnx", None, {"eval": 3}, "eval is of type int, which holds no data"),
        ("m.onnx", None, {"eval": {"x": object()}}, "eval: x is of type object, which holds no numbers"),
    ],
)  # fmt: skip
def test_bad_words_get_one_line_with_the_way_out(model, inputs, said, says):
    with pytest.raises(EdgeshipError) as raised:
        make_order(model, inputs, **said)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
