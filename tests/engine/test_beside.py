"""Steps in worker processes: the same results, rows, log and errors as in order, and nothing is left of what is ended."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from edgeship.core.model import Signature, Source, TorchModel
from edgeship.core.plan import Plan, Step
from edgeship.engine.beside import run_beside
from edgeship.engine.cache import Cache
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Silence, Surroundings, execute
from edgeship.engine.workers import Crew
from edgeship.errors import LimitError, LoweringError, OutputError, SourceError, UsageError

PASSES = """
import errno, os, signal, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from edgeship.core.artifact import Bundle
from edgeship.core.model import OnnxModel, Signature, Source, TorchModel
from edgeship.core.passes import Context, Pass
from edgeship.core.report import Measurements, Verdict
from edgeship.errors import LoweringError, SourceError

SIGNATURE = Signature((), ())


class Unreadable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Planned(Pass):
    @classmethod
    def plan(cls, request):
        return cls()


@dataclass(frozen=True)
class Load(Planned):
    name: ClassVar[str] = "load/test"

    def run(self, model: Source, ctx: Context) -> TorchModel:
        (ctx.folder / "program").mkdir()
        (ctx.folder / "program" / "text").write_text("program")
        return TorchModel(ctx.folder / "program", SIGNATURE)


@dataclass(frozen=True)
class Lower(Planned):
    name: ClassVar[str] = "lower/test"
    does: str = ""
    number: int = 0

    def run(self, model: TorchModel, ctx: Context) -> OnnxModel:
        print("chatter of", self.number)
        os.write(2, b"more of %d\\n" % self.number)
        ctx.log(f"a line of {self.number}")
        ctx.say(f"said by {self.number}")
        ctx.progress(1, 2, "half")
        tempfile.mkdtemp()
        if self.does == "purpose":
            raise SourceError("on purpose", fix="another way")
        if self.does == "bug":
            raise ZeroDivisionError("a bug")
        if self.does == "odd":
            raise Unreadable("not to be pickled", 2)
        if self.does == "memory":
            raise MemoryError
        if self.does == "disk":
            raise OSError(errno.ENOSPC, "no", "place")
        if self.does == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.does == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.does == "gone":
            os._exit(3)
        if self.does.startswith("/"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(self.does, f"{self.number}.ids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        if self.does.startswith("slow"):
            time.sleep(float(self.does[4:]))
        (ctx.folder / "model.onnx").write_text((model.path / "text").read_text() + f"{self.number} {os.getpid()}"[:-1])
        return OnnxModel(ctx.folder / "model.onnx", SIGNATURE, files=("model.onnx",), facts={"by": str(os.getpid())})


@dataclass(frozen=True)
class Check(Planned):
    name: ClassVar[str] = "check/test"
    cached: ClassVar[bool] = False

    def run(self, model: OnnxModel, original: TorchModel, ctx: Context) -> Verdict:
        return Verdict(self.name, "onnx", True, str(os.environ["OMP_NUM_THREADS"]))


@dataclass(frozen=True)
class Time(Planned):
    name: ClassVar[str] = "ship/time"
    cached: ClassVar[bool] = False

    def run(self, model: OnnxModel, ctx: Context) -> Measurements:
        import psutil

        others = [item for item in psutil.Process().children() if item.status() == psutil.STATUS_RUNNING]
        assert not [item for item in others if item.cpu_percent(0.05) > 20]
        return Measurements(())


@dataclass(frozen=True)
class Gather(Planned):
    name: ClassVar[str] = "ship/test"

    def run(self, gathered, ctx: Context) -> Bundle: ...
"""
SOURCE = Source(Path("m.py"), Signature((), ()), "0")


@pytest.fixture
def passes(tmp_path, monkeypatch):
    """The passes of `PASSES`, as a module that worker processes find too."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "passes_beside.py").write_text(PASSES)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("passes_beside", None)
    import passes_beside

    yield passes_beside
    del sys.modules["passes_beside"]


class Told(Silence):
    def __init__(self):
        self.heard = []

    def moved(self, step, done, total, what):
        self.heard.append((step.index, done, total, what))

    def said(self, step, line):
        self.heard.append((step.index, line))

    def finished(self, step, seconds, cached):
        self.heard.append((step.index, "finished", cached))

    def failed(self, step):
        self.heard.append((step.index, "failed"))


@pytest.fixture
def plan(passes):
    def make(*does: str) -> Plan:
        """One loaded program, an artifact for each of several routes with its check and its timing."""
        routes = tuple((f"phone{number}", "onnx") for number in range(len(does)))
        steps = [Step(0, passes.Load(), {"model": -1}, "TorchModel", routes)]
        for number, word in enumerate(does):
            at = len(steps)
            mine = (routes[number],)
            steps.append(Step(at, passes.Lower(word, number), {"model": 0}, "OnnxModel", mine))
            steps.append(Step(at + 1, passes.Check(), {"model": at, "original": 0}, "Verdict", mine))
            steps.append(Step(at + 2, passes.Time(), {"model": at}, "Measurements", mine))
        steps.append(Step(len(steps), passes.Gather(), {}, "Bundle", routes))
        return Plan(tuple(steps), {})

    return make


@pytest.fixture
def run(tmp_path):
    def go(plan, jobs=2, *, whole=False, gather=None, folder="a"):
        """Run a plan beside (or in order, with ``jobs`` 1), in a cache and with a log of its own."""
        place = tmp_path / folder
        go.cache, go.log, told = Cache(place / "cache"), Log(place / "x.log"), Told()
        go.told = told.heard
        if jobs == 1:
            return execute(plan, SOURCE, go.cache, go.log, told, gather, (), whole)
        with Crew(jobs, jobs) as crew:
            around = Surroundings(SOURCE, go.cache, go.log, told, gather)
            return run_beside(plan, around, (), crew.workers, whole)

    return go


def left(run) -> list[Path]:
    return list((run.cache.root / "running").glob("*"))


def texts(execution, plan) -> list[str]:
    return [execution.results[step.index].path.read_text() for step in plan.steps if step.name == "lower/test"]


def test_steps_run_in_other_processes_and_their_results_come_back(run, plan):
    made = plan("", "", "")
    execution = run(made)
    assert sorted(execution.results) == list(range(10))
    workers = {execution.results[index].facts["by"] for index in (1, 4, 7)}
    assert str(os.getpid()) not in workers
    assert len(workers) == 2
    assert [text[: len("program0")] for text in texts(execution, made)] == ["program0", "program1", "program2"]
    assert left(run) == []


def test_what_is_reported_has_the_order_of_the_plan_whatever_ends_first(run, plan):
    made = plan("slow1", "", "")
    seen = []
    execution = run(made, gather=lambda step, execution: seen.append([time.step for time in execution.times]))
    order = [f"{step.index} {step.name}" for step in made.steps]
    assert [time.step for time in execution.times] == order
    assert seen == [order[:-1]]
    # The second route ended before the first, and yet comes after it in the log.
    finished = [heard[0] for heard in run.told if heard[1] == "finished"]
    assert finished.index(4) < finished.index(1)
    log = run.log.path.read_text()
    assert log.index("chatter of 0") < log.index("chatter of 1") < log.index("chatter of 2")
    assert {(1, "said by 0"), (4, "said by 1"), (4, 1, 2, "half")} <= set(run.told)


def test_the_log_says_what_it_says_in_order(run, plan):
    made = plan("", "purpose", "")
    run(made, folder="beside")
    beside = run.log.path.read_text().splitlines()
    run(made, jobs=1, folder="order")
    order = run.log.path.read_text().splitlines()

    def told(lines):
        """Without the frames of tracebacks, and timings, which come last."""
        return sorted(line for line in lines if not line.startswith((" ", "Traceback")))

    assert told(beside) == told(order)
    steps = [line for line in beside if line.startswith("== ") and "ship/" not in line]
    assert steps == [line for line in order if line.startswith("== ") and "ship/" not in line]


def test_what_is_in_the_cache_is_taken_from_it_and_starts_no_process(run, plan):
    made = plan("", "")
    run(made)
    with Crew(2, 2) as crew:
        execution = run_beside(
            Plan(made.steps[:2], {}), Surroundings(SOURCE, run.cache, run.log, Silence()), (), crew.workers
        )
        assert all(worker._process is None for worker in crew.workers)
    assert [time.cached for time in execution.times] == [True, True]


@pytest.mark.parametrize(
    ("does", "kind", "says"),
    [
        ("purpose", SourceError, "on purpose; another way"),
        ("bug", ZeroDivisionError, "a bug"),
        ("odd", None, "not to be pickled"),
        ("memory", LimitError, "lower/test: it needs more memory than there is"),
        ("killed", LimitError, "lower/test: its process was killed, most likely because memory ran out"),
        ("crash", LoweringError, "lower/test: its process crashed (SIGSEGV)"),
        ("gone", LoweringError, "lower/test: its process ended with code 3"),
    ],
)
def test_a_step_that_fails_takes_its_own_route_with_it_and_no_other(run, plan, does, kind, says):
    made = plan("", does, "slow0.2", "")
    gathered = []
    execution = run(made, gather=lambda step, execution: gathered.append(step.name))
    assert execution.refused(made) == {("phone1", "onnx"): 4}
    assert type(execution.failures[4]).__name__ == (kind.__name__ if kind else "Unreadable")
    assert str(execution.failures[4]).startswith(says)
    assert sorted(execution.results) == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert gathered == ["ship/test"]
    assert (4, "failed") in run.told
    assert left(run) == []


@pytest.mark.parametrize("does", ["purpose", "bug", "memory"])
def test_the_error_of_a_step_is_what_it_is_in_order(run, plan, does):
    made = plan("", does)
    beside = run(made, folder="beside").failures[4]
    order = run(made, jobs=1, folder="order").failures[4]
    assert (type(beside), str(beside)) == (type(order), str(order))
    assert "Traceback" in run.log.path.read_text()


def test_all_or_nothing_raises_the_first_error_of_the_plan_not_of_the_clock(run, plan):
    made = plan("slow1", "slow0.5", "purpose", "bug")
    with pytest.raises(SourceError, match="on purpose"):
        run(made, jobs=4, whole=True)
    assert left(run) == []


def test_a_worker_that_was_stopped_answers_again(passes, tmp_path):
    """A step that ended just before it was stopped leaves a worker that what comes before the error may still want."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "text").write_text("program")
    model = TorchModel(folder, passes.SIGNATURE)
    with Crew(1, 1) as crew:
        (worker,) = crew.workers
        for number in range(3):
            place = tmp_path / f"{number}" / "out"
            place.mkdir(parents=True)
            step = Step(1, passes.Lower("", number), {"model": 0}, "OnnxModel", (("phone", "onnx"),))
            answer = worker.run(step, {"model": model}, place, None, lambda *said: None)
            assert answer.error is None
            worker.stop()
            worker.renew()


def test_all_or_nothing_waits_for_what_comes_before_an_error_and_not_for_what_comes_after(run, plan):
    begin = time.monotonic()
    with pytest.raises(SourceError, match="on purpose"):
        run(plan("purpose", "slow60", "slow60"), jobs=3, whole=True)
    assert time.monotonic() - begin < 30


def test_a_full_disk_ends_every_route(run, plan):
    with pytest.raises(OutputError, match="no space left on the disk of place"):
        run(plan("disk", "slow60"))


def test_when_no_route_is_left_the_first_reason_of_the_plan_is_raised(run, plan):
    with pytest.raises(SourceError, match="on purpose"):
        run(plan("purpose", "bug", "crash"), jobs=3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_when_no_route_is_left_the_runtimes_that_failed_too_are_named(run, plan, jobs):
    made = plan("purpose", "bug")
    routes = (("phone0", "onnx"), ("phone1", "tflite"))
    of = {("phone0", "onnx"): routes[0], ("phone1", "onnx"): routes[1]}
    steps = tuple(replace(step, routes=tuple(map(of.get, step.routes))) for step in made.steps)
    with pytest.raises(SourceError, match=r"^on purpose; tflite failed too"):
        run(replace(made, steps=steps), jobs=jobs, folder=f"jobs{jobs}")


def test_threads_are_shared_out(run, plan, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = plan("", "")
    assert run(made).results[2].summary == "1"


SCRIPT = """
import signal
import sys
from pathlib import Path
from edgeship.core.model import Signature, Source, TorchModel
from edgeship.core.plan import Plan, Step
from edgeship.engine.beside import run_beside
from edgeship.engine.cache import Cache
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Silence, Surroundings
from edgeship.engine.workers import Crew
import passes_beside as passes

# A test that was started in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
routes = (("a", "onnx"), ("b", "onnx"))
steps = [Step(0, passes.Load(), {"model": -1}, "TorchModel", routes)]
steps += [Step(n + 1, passes.Lower(str(folder), n), {"model": 0}, "OnnxModel", (routes[n],)) for n in range(2)]
source = Source(Path("m.py"), Signature((), ()), "0")
cache = Cache(folder / "cache")
try:
    with Crew(2, 2) as crew:
        run_beside(Plan(tuple(steps), {}), Surroundings(source, cache, Log(folder / "x.log"), Silence()), (), crew.workers)
except KeyboardInterrupt:
    print("stopped", list((folder / "cache" / "running").glob("*")))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_what_ends_the_build_ends_its_workers_and_what_they_started(passes, tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, sys.path)))}
    build = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    files = [tmp_path / "0.ids", tmp_path / "1.ids"]
    end = time.monotonic() + 120
    while time.monotonic() < end and not all(file.is_file() and file.read_text() for file in files):
        time.sleep(0.05)
    ids = [int(word) for file in files for word in file.read_text().split()]
    assert len(ids) == 4
    build.send_signal(number)
    out, _ = build.communicate(timeout=60)
    end = time.monotonic() + 30
    while time.monotonic() < end and any(map(psutil.pid_exists, ids)):
        time.sleep(0.05)
    assert not [number for number in ids if psutil.pid_exists(number)]
    if number == signal.SIGINT:
        assert out == "stopped []\n"
    # What a killed build left is nobody's, and the next one removes it.
    Cache(tmp_path / "cache").sweep()
    assert list((tmp_path / "cache" / "running").glob("*")) == []


@pytest.mark.parametrize("runtimes", ["onnx,coreml", pytest.param("onnx,tflite,coreml", marks=pytest.mark.heavy)])
def test_a_build_beside_makes_the_same_bundle(cli, tiny_source, tmp_path, runtimes):
    """Digests of all artifacts, rows, refusals and lines of the report."""
    import json

    reports, manifests = [], []
    for jobs in ("1", "2"):
        output = tmp_path / f"tiny{jobs}.edgeship"
        ran = cli(
            "build", tiny_source, "--input", "image:f32[1,1,4,4]", "--target", "iphone15pro", "--runtime", runtimes,
            "--jobs", jobs, "-o", output, env={"EDGESHIP_CACHE": str(tmp_path / f"cache{jobs}")},
        )  # fmt: skip
        assert ran.code == 0, ran.err
        reports.append(json.loads((output / "report.json").read_text()))
        manifests.append(json.loads((output / "manifest.json").read_text()))
        lines = [line for line in ran.err.splitlines() if line.startswith(("+", "="))]
        # Packing is told too, and is no part of the report in what it packs.
        assert len(lines) == len(reports[-1]["steps"]) + 1
    one, two = manifests
    assert one["artifacts"] == two["artifacts"]
    assert [step["step"] for step in reports[0]["steps"]] == [step["step"] for step in reports[1]["steps"]]
    for row, other in zip(reports[0]["rows"], reports[1]["rows"], strict=True):
        assert row["verdicts"] == other["verdicts"]
        assert (row["runtime"], row["size_bytes"], row["weights"]) == (other["runtime"], other["size_bytes"], other["weights"])  # fmt: skip


@pytest.mark.parametrize("jobs", [0, -1, 65, True, "2"])
def test_a_number_of_processes_that_is_none_is_refused(tiny_source, jobs):
    from edgeship.api import make_order

    with pytest.raises(UsageError, match="--jobs"):
        make_order(tiny_source, targets=["linux-x86"], jobs=jobs)
