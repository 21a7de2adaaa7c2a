"""What may be said together: the same message on the command line and in Python, for every rule of the table."""

import pytest

import edgeship
from edgeship.api.orders import Said, make_order
from edgeship.api.rules import RULES, Situation, check_rules
from edgeship.cli.main import build as build_command
from edgeship.errors import EdgeshipError, UsageError

NETWORK = Situation(make_order("m.py:f"), "torch", calibrated=False, evaluated=False)
DECODER = Situation(make_order("folder"), "decoder", calibrated=False, evaluated=False)
MEMORY = Situation(make_order("Module"), "memory", calibrated=False, evaluated=False)
EXPORT = Situation(make_order("m.pt2"), "export", calibrated=False, evaluated=False)
# For every option of the table: how each side says it, and where it means nothing.
SAID = {
    "--max-drop": (["--max-drop", "1%"], {"max_drop": "1%"}, NETWORK),
    "--metric": (["--metric", "cosine"], {"metric": "cosine"}, NETWORK),
    "--activations int8": (["--activations", "int8"], {"activations": "int8"}, NETWORK),
    "--weights": (
        ["--weights", "int8", "--set", "compress/quantize.bits=4"],
        {"weights": "int8", "passes": [edgeship.Quantize(bits=4)]},
        NETWORK,
    ),
    "--factory": (["--factory", "m.py:f"], {"factory": "m.py:f"}, MEMORY),
    "--weights-key": (["--weights-key", "ema"], {"weights_key": "ema"}, NETWORK),
    "--part": (["--part", "encoder"], {"part": "encoder"}, NETWORK),
    "--context": (["--context", "64"], {"context": 64}, NETWORK),
    "--kv-cache": (["--kv-cache", "int8"], {"kv_cache": "int8"}, NETWORK),
    "--input": (["--input", "x:f32[1,2]"], {"inputs": "x:f32[1,2]"}, EXPORT),
    "--input-name": (["--input-name", "x=image"], {"input_names": {"x": "image"}}, DECODER),
    "--output-name": (["--output-name", "y"], {"output_names": ["y"]}, DECODER),
    "--cut": (["--cut", "a.b"], {"cut": ["a.b"]}, DECODER),
    "--lora": (["--lora", "dir"], {"lora": "dir"}, NETWORK),
    "--adapter": (["--adapter", "a=dir"], {"adapters": {"a": "dir"}}, NETWORK),
}


def test_every_rule_is_asked():
    assert {rule.option for rule in RULES} == set(SAID)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.option)
def test_a_rule_refuses_what_means_nothing_and_nothing_else(rule):
    _, said, situation = SAID[rule.option]
    said = dict(said)
    order = make_order(situation.order.source, said.pop("inputs", None), **said)
    with pytest.raises(UsageError) as raised:
        check_rules(Situation(order, situation.form, situation.calibrated, situation.evaluated))
    assert str(raised.value) == f"{rule.option} {rule.because}; {rule.fix}"
    check_rules(situation)


@pytest.mark.parametrize("option", [name for name, (_, _, situation) in SAID.items() if situation is NETWORK])
def test_both_sides_say_the_same(option, cli, tiny_source):
    words, said, _ = SAID[option]
    more = [] if "--input" in words else ["--input", "image:f32[1,1,4,4]"]
    ran = cli("plan", tiny_source, *more, "--target", "linux-x86", "--runtime", "onnx", *words)
    with pytest.raises(EdgeshipError) as raised:
        edgeship.plan(tiny_source, "image:f32[1,1,4,4]", target="linux-x86", runtime="onnx", **said)
    assert ran.errors == [f"error: {raised.value}"]
    assert ran.code == raised.value.exit_code
    assert str(raised.value).startswith(option)


def test_the_command_line_and_python_have_the_same_words():
    """What one side can say, the other can: by the same name, but for flags and lists."""
    other = {"settings": "options", "no_cache": "cache"}
    shown = {"source", "inputs", "dry_run", "as_json", "verbose", "help"}
    options = {other.get(item.name, item.name) for item in build_command.params} - shown
    # A tokenizer comes with a folder; passes are what --set says; one name of each pair is enough for options.
    assert options == set(Said.__annotations__) - {"tokenizer", "passes", "target", "runtime"}


def test_weights_and_activations_are_planned_as_they_are_asked_for(cli, tiny_source):
    """In place of the profile's, and no layer is given more bits for what it costs."""
    words = (tiny_source, "--input", "image:f32[1,1,4,4]", "--target", "linux-x86", "--runtime", "tflite")
    for weights, activations in (("int4", "dynamic"), ("float16", "float")):
        ran = cli("plan", *words, "--weights", weights, "--activations", activations)
        said = {"weights": weights, "activations": activations}
        plan = edgeship.plan(tiny_source, "image:f32[1,1,4,4]", target="linux-x86", runtime="tflite", **said)
        assert ran.out == plan.text() + "\n"
        step = next(step.task for step in plan.steps if step.name == "compress/quantize")
        assert (step.base.short_name, step.floor_db) == (weights, 0)
