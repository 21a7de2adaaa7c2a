"""Steps run in order, come from the cache when they can, keep their promises, and report what they meet."""

import errno
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from edgeship.core.artifact import Bundle
from edgeship.core.model import OnnxModel, Signature, Source, TorchModel
from edgeship.core.passes import Context, Pass
from edgeship.core.plan import Plan, Step
from edgeship.core.report import Verdict
from edgeship.engine import running as running_module
from edgeship.engine.cache import Cache
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Silence, execute
from edgeship.errors import LoweringError, OutputError, SourceError

SIGNATURE = Signature((), ())
SOURCE = Source(Path("m.py"), SIGNATURE, "0")


class Planned(Pass):
    """Only `run` matters here."""

    ran: ClassVar[list[str]] = []

    @classmethod
    def plan(cls, request):
        return cls()


@dataclass(frozen=True)
class Load(Planned):
    name: ClassVar[str] = "load/test"
    text: str = "program"

    def run(self, model: Source, ctx: Context) -> TorchModel:
        self.ran.append(self.name)
        print("chatter")
        ctx.progress(1, 2, "half")
        (ctx.folder / "program").mkdir()
        (ctx.folder / "program" / "text").write_text(self.text)
        return TorchModel(ctx.folder / "program", SIGNATURE)


@dataclass(frozen=True)
class Lower(Planned):
    name: ClassVar[str] = "lower/test"
    fails: str = ""
    promises: bool = True

    def run(self, model: TorchModel, ctx: Context) -> OnnxModel:
        self.ran.append(self.name)
        if self.fails == "purpose":
            raise SourceError("on purpose")
        if self.fails == "bug":
            raise ZeroDivisionError("a bug")
        if self.fails.isdigit():
            raise OSError(int(self.fails), "no", "place")
        (ctx.folder / "model.onnx").write_text((model.path / "text").read_text() + "!")
        return OnnxModel(ctx.folder / "model.onnx", SIGNATURE, files=("model.onnx",))

    def ensures(self, output, **inputs) -> None:
        if not self.promises:
            raise LoweringError("the promise is broken")
        assert inputs["model"].digest


@dataclass(frozen=True)
class Check(Planned):
    name: ClassVar[str] = "check/test"
    cached: ClassVar[bool] = False

    def run(self, model: OnnxModel, original: TorchModel, ctx: Context) -> Verdict:
        self.ran.append(self.name)
        return Verdict(self.name, "onnx", True, model.path.read_text())


@dataclass(frozen=True)
class Gather(Planned):
    name: ClassVar[str] = "ship/test"

    def run(self, gathered, ctx: Context) -> Bundle: ...


class Told(Silence):
    def __init__(self):
        self.heard = []

    def moved(self, step, done, total, what):
        self.heard.append((step.name, done, total, what))

    def finished(self, step, seconds, cached):
        self.heard.append((step.name, cached))

    def failed(self, step):
        self.heard.append((step.name, "failed"))


@pytest.fixture
def run(tmp_path):
    Planned.ran.clear()

    def go(lower=Lower(), load=Load(), done=(), gather=None, cache=None):
        steps = (
            Step(0, load, {"model": -1}, "TorchModel", ()),
            Step(1, lower, {"model": 0}, "OnnxModel", ()),
            Step(2, Check(), {"model": 1, "original": 0}, "Verdict", ()),
            Step(3, Gather(), {}, "Bundle", ()),
        )
        told = Told()
        go.told = told.heard
        cache = cache or Cache(tmp_path / "cache")
        return execute(Plan(steps, {}), SOURCE, cache, Log(tmp_path / "x.log"), told, gather, done)

    return go


def running(tmp_path) -> list[Path]:
    return list((tmp_path / "cache" / "running").glob("*"))


def test_results_flow_from_step_to_step(run, tmp_path):
    execution = run()
    assert Planned.ran == ["load/test", "lower/test", "check/test"]
    assert execution.results[2].summary == "program!"
    assert [time.step for time in execution.times] == ["0 load/test", "1 lower/test", "2 check/test", "3 ship/test"]
    assert run.told[0] == ("load/test", 1, 2, "half")
    assert "chatter" in (tmp_path / "x.log").read_text()
    assert running(tmp_path) == []


def test_a_second_run_takes_from_the_cache_what_may_be_cached(run):
    first = run()
    Planned.ran.clear()
    second = run()
    assert Planned.ran == ["check/test"]
    assert [time.cached for time in second.times] == [True, True, False, False]
    assert second.results == first.results


def test_a_changed_option_runs_its_step_and_those_that_depend_on_it(run):
    run()
    Planned.ran.clear()
    assert run(load=Load("other")).results[2].summary == "other!"
    assert Planned.ran == ["load/test", "lower/test", "check/test"]


def test_a_changed_option_with_an_equal_result_ends_there(run):
    """The digest of a model is over its content: what depends on it does not run again."""
    run()
    Planned.ran.clear()

    @dataclass(frozen=True)
    class Other(Load):
        name: ClassVar[str] = "load/other"

    run(load=Other())
    assert Planned.ran == ["load/other", "check/test"]


def test_steps_already_done_in_this_command_are_not_looked_up_again(run):
    loaded = run().results[0]
    execution = run(done=[(Load(), loaded)])
    assert execution.results[0] is loaded
    assert next(time.step for time in execution.times) == "1 lower/test"


def test_gathering_sees_everything(run):
    seen = []
    run(gather=lambda step, execution: seen.append((step.name, sorted(execution.results))))
    assert seen == [("ship/test", [0, 1, 2])]


def test_a_broken_promise_is_never_kept(run, tmp_path):
    with pytest.raises(LoweringError, match="promise"):
        run(Lower(promises=False))
    assert running(tmp_path) == []
    Planned.ran.clear()
    with pytest.raises(LoweringError, match="promise"):
        run(Lower(promises=False))
    assert Planned.ran == ["lower/test"]


@pytest.mark.parametrize(("fails", "kind"), [("purpose", SourceError), ("bug", ZeroDivisionError)])
def test_a_failed_step_leaves_nothing_but_its_log(run, tmp_path, fails, kind):
    with pytest.raises(kind):
        run(Lower(fails))
    assert run.told[-1] == ("lower/test", "failed")
    assert kind.__name__ in (tmp_path / "x.log").read_text()
    assert running(tmp_path) == []
    assert run().results[2].summary == "program!"


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "no space left on the disk of place"), (errno.EACCES, "place cannot be written"),
     (errno.EROFS, "place cannot be written"), (errno.EIO, "place: no; see the log file")],
)  # fmt: skip
def test_what_the_disk_says_is_one_line(run, number, says):
    with pytest.raises(OutputError) as raised:
        run(Lower(str(number)))
    assert says in str(raised.value)


def test_an_odd_error_on_a_full_disk_is_the_disks(run, monkeypatch):
    monkeypatch.setattr(running_module, "FULL_BYTES", 1 << 62)
    with pytest.raises(OutputError, match="no space left"):
        run(Lower("bug"))


def test_a_pass_that_makes_something_else_is_a_bug(run):
    @dataclass(frozen=True)
    class Odd(Lower):
        name: ClassVar[str] = "lower/odd"

        def run(self, model: TorchModel, ctx: Context) -> OnnxModel:
            return Source(ctx.folder, SIGNATURE)

    with pytest.raises(TypeError, match="lower/odd made a Source"):
        run(Odd())


def two_routes(first: Lower, second: Lower) -> Plan:
    """One loaded program, two artifacts, each with its check."""
    phone, board = ("phone", "onnx"), ("board", "onnx")
    return Plan(
        (
            Step(0, Load(), {"model": -1}, "TorchModel", (phone, board)),
            Step(1, first, {"model": 0}, "OnnxModel", (phone,)),
            Step(2, Check(), {"model": 1, "original": 0}, "Verdict", (phone,)),
            Step(3, second, {"model": 0}, "OnnxModel", (board,)),
            Step(4, Check(), {"model": 3, "original": 0}, "Verdict", (board,)),
            Step(5, Gather(), {}, "Bundle", (phone, board)),
        ),
        {},
    )


@pytest.fixture
def run_routes(tmp_path):
    Planned.ran.clear()

    def go(plan, gather=None, **options):
        cache, log = Cache(tmp_path / "cache"), Log(tmp_path / "x.log")
        return execute(plan, SOURCE, cache, log, Silence(), gather, all_or_nothing=False, **options)

    return go


@pytest.mark.parametrize(("fails", "kind"), [("purpose", SourceError), ("bug", ZeroDivisionError)])
def test_a_step_that_fails_takes_its_own_route_with_it_and_no_other(run_routes, tmp_path, fails, kind):
    plan = two_routes(Lower(fails), Lower())
    gathered = []
    execution = run_routes(plan, gather=lambda step, execution: gathered.append(step.name))
    assert sorted(execution.results) == [0, 3, 4]
    assert execution.refused(plan) == {("phone", "onnx"): 1}
    assert isinstance(execution.failures[1], kind)
    assert gathered == ["ship/test"]
    assert kind.__name__ in (tmp_path / "x.log").read_text()
    assert running(tmp_path) == []


def test_when_no_route_is_left_the_first_reason_is_raised(run_routes):
    with pytest.raises(SourceError, match="on purpose"):
        run_routes(two_routes(Lower("purpose"), Lower("bug")))


@pytest.mark.parametrize("second", ["purpose", "bug"])
def test_when_no_route_is_left_the_runtimes_that_failed_too_are_named(run_routes, second):
    plan = two_routes(Lower("purpose"), Lower(second))
    board = [replace(step, routes=(("board", "tflite"),)) for step in plan.steps[3:5]]
    routes = (("phone", "onnx"), ("board", "tflite"))
    steps = (replace(plan.steps[0], routes=routes), *plan.steps[1:3], *board, replace(plan.steps[5], routes=routes))
    with pytest.raises(SourceError) as caught:
        run_routes(Plan(steps, {}))
    assert str(caught.value).startswith("on purpose; tflite failed too (the log says why)")


def test_two_targets_of_one_runtime_are_not_named_twice(run_routes):
    with pytest.raises(SourceError) as caught:
        run_routes(two_routes(Lower("purpose"), Lower("purpose")))
    assert "failed too" not in str(caught.value)


def test_a_failed_step_that_all_routes_share_ends_the_build(run_routes):
    plan = two_routes(Lower(), Lower())
    shared = replace(plan.steps[1], task=Lower("purpose"), routes=plan.steps[0].routes)
    with pytest.raises(SourceError):
        run_routes(Plan((plan.steps[0], shared, *plan.steps[2:]), {}))


def test_a_full_disk_ends_every_route(run_routes):
    with pytest.raises(OutputError, match="no space left"):
        run_routes(two_routes(Lower(str(errno.ENOSPC)), Lower()))
    assert Planned.ran == ["load/test", "lower/test"]
