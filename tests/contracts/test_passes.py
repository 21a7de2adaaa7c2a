"""What every pass keeps: options in a frozen dataclass, a name that is its place, typed edges, a plan or a reason."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from edgeship.core.artifact import Bundle
from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.model import Artifact, Model, Signature, Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.plan import made_name
from edgeship.core.profile import DataRef, Request
from edgeship.core.records import from_plain, to_plain
from edgeship.core.registry import STAGES, passes, profiles, runtimes, targets
from edgeship.core.report import Measurements, Verdict
from edgeship.errors import EdgeshipError


def example() -> type[Pass]:
    """The pass of docs/adding-a-pass.md, as it would be in edgeship itself."""
    path = Path(__file__).parents[1] / "plugins" / "clip" / "src" / "edgeship_clip" / "clip.py"
    spec = importlib.util.spec_from_file_location("edgeship.passes.compress.clip", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.ClipWeights


EVERY = sorted({**passes(), "compress/clip": example()}.items())
FORMS = (
    "torch", "export", "torchscript", "huggingface", "safetensors", "pickle", "onnx", "memory", "decoder", "llama2c",
)  # fmt: skip
ENGINES = {item.format.name: item.name for item in runtimes().values() if item.engine.for_language}
INVENTORY = Inventory((WeightUse("w", "linear", (4, 8)), WeightUse("b", "other", (4,))), (), 32)


def requests():
    load = {"inputs": ("x:f32[1,8]",), "outputs": (), "factory": "m.py:f", "notes": {}}
    for form in FORMS:
        source = Source(Path("m"), Signature((), ()), "0", form=form, reference="m")
        for target in targets().values():
            for profile in profiles().values():
                names = target.runtime_names
                for runtime in [ENGINES[name] for name in names if name in ENGINES] if form in FORMS[-2:] else names:
                    for data in (None, DataRef("d.npz", "1")):
                        yield Request(source, target, runtime, profile, INVENTORY, data, data, load=load)
                        asked = {"compress/prune": {"sparsity": 0.5}, "compress/smooth": {}, "compress/finetune": {}}
                        asked["compress/clip"] = {"deviations": 3.0}
                        yield Request(source, target, runtime, profile, INVENTORY, data, data, options=asked, load=load)


REQUESTS = list(requests())


@pytest.fixture(params=EVERY, ids=[name for name, _ in EVERY])
def item(request) -> tuple[str, type[Pass]]:
    return request.param


def test_name_folder_and_file_are_the_same(item):
    name, cls = item
    stage, _, file = name.partition("/")
    assert stage in STAGES
    assert cls.__module__ == f"edgeship.passes.{stage}.{file}"
    assert cls.name == name
    assert importlib.import_module(cls.__module__).__doc__


def test_it_is_a_frozen_dataclass_with_defaults(item):
    cls = item[1]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls() == cls()
    hash(json.dumps(to_plain(cls())))


def test_options_survive_plain_data(item):
    cls = item[1]
    assert from_plain(cls, to_plain(cls())) == cls()


def test_the_docstring_begins_with_the_sentence_that_users_read(item):
    summary = item[1].summary()
    assert re.fullmatch(r"[A-Z].{10,115}\.", summary), summary
    assert item[1].__doc__ is not None


def test_edges_are_typed(item):
    cls = item[1]
    inputs, made = cls.edges()
    hints = get_type_hints(cls.run)
    assert hints["ctx"] is Context
    assert made in (Verdict, Measurements, Bundle) or issubclass(made, Model)
    assert all(issubclass(kind, Model) for kind in inputs.values())
    assert set(inputs) <= {"model", "reference", "original"}
    assert all(inputs[name] is TorchModel for name in ("reference", "original") if name in inputs)
    assert made_name(made)
    expected = {"load": "bridge", "compress": "refinement", "lower": "bridge"}
    stage = cls.name.split("/")[0]
    assert cls.shape() == expected.get(stage, cls.shape())
    if stage == "check":
        assert cls.shape() == "check"
        assert inputs["model"] is Artifact
    if stage == "load":
        assert inputs == {"model": Source}
        assert made is TorchModel


def test_it_names_the_tools_that_decide_its_result(item):
    cls = item[1]
    needs_none = {"check/size", "ship/package", "ship/benchmark"}
    assert all(isinstance(tool, str) for tool in cls.tools)
    assert bool(cls.tools) != (cls.name in needs_none)


def test_it_plans_itself_or_says_why_not(item):
    cls = item[1]
    answers: list[Any] = []
    for request in REQUESTS:
        try:
            answers.append(cls.plan(request))
        except EdgeshipError as error:
            assert error.what
            assert error.fix
    for answer in answers:
        assert type(answer) is cls or (isinstance(answer, Skip) and len(answer.reason) > 5)
    assert any(type(answer) is cls for answer in answers), "never planned"


def test_planning_twice_gives_the_same_step(item):
    cls = item[1]
    for request in REQUESTS[::37]:
        try:
            assert cls.plan(request) == cls.plan(request)
        except EdgeshipError:
            continue


def test_refinements_say_what_they_settle(item):
    cls = item[1]
    assert bool(cls.settles) == (cls.shape() == "refinement")
    assert all(name in passes() for name in (*cls.after, *cls.before))


def test_every_form_of_source_has_one_loader():
    for form in FORMS:
        request = next(request for request in REQUESTS if request.source.form == form)
        loaders = [cls for name, cls in EVERY if name.startswith("load/") and not isinstance(cls.plan(request), Skip)]
        assert len(loaders) == 1, form


def test_every_runtime_of_every_target_can_be_reached_by_every_profile():
    from edgeship.engine.planner import plan_build

    for target in targets().values():
        for profile in profiles().values():
            for runtime in target.runtime_names:
                found = next(
                    item
                    for item in REQUESTS
                    if (item.target, item.profile, item.runtime, item.source.form)
                    == (target, profile, runtime, "torch")
                )
                names = [step.name for step in plan_build([found]).steps]
                assert {"check/verify", "check/size", "ship/package", "ship/benchmark"} <= set(names)


def test_every_field_can_be_set_or_says_what_decides_it(item):
    from edgeship.engine.planner import apply_options

    cls = item[1]
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(cls.options()) | set(cls.follows()) == fields
    assert not set(cls.options()) & set(cls.follows())
    assert set(cls.limits) <= set(cls.options())
    assert set(cls.decided) <= fields
    plain = to_plain(cls())
    for name in cls.options():
        value = plain[name]
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if value is not None:
            assert apply_options(cls(), {name: text}) == cls(), name


def test_literal_options_have_their_default_among_the_choices(item):
    cls = item[1]
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        choices = get_args(hints[field.name])
        if choices and all(isinstance(choice, str) for choice in choices):
            assert getattr(cls(), field.name) in choices
