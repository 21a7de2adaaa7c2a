"""Results are kept under everything that decides them: the same key gives them back, any change does not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.model import OnnxModel, Signature, TensorSpec, TorchModel
from edgeship.core.passes import Pass, Skip
from edgeship.core.registry import runtimes
from edgeship.core.report import Measurement, Measurements, Verdict
from edgeship.engine import cache as module
from edgeship.engine.cache import Cache, default_cache_root
from edgeship.errors import OutputError, UsageError
from edgeship.passes.check.accuracy import CheckAccuracy
from edgeship.passes.check.size import CheckSize
from edgeship.passes.check.verify import VerifyArtifact
from edgeship.passes.ship.benchmark import Benchmark

SIGNATURE = Signature((TensorSpec("x", "f32", (1, 2)),), (TensorSpec("y", "f32", (1, 3)),))
KEY = "k" * 64


@dataclass(frozen=True)
class Lower(Pass):
    """Only for keys."""

    name: ClassVar[str] = "lower/test"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    bits: int = 8
    notes: tuple[str, ...] = ()

    @classmethod
    def plan(cls, request):
        return Skip("never")


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


def put(cache: Cache, key: str = KEY, text: str = "weights", dependencies: dict[str, str] | None = None):
    folder = cache.scratch(key)
    (folder / "model.onnx").write_text(text)
    if dependencies is not None:
        (folder / "dependencies.json").write_text(json.dumps(dependencies))
    return cache.put(key, folder, OnnxModel(folder / "model.onnx", SIGNATURE, files=("model.onnx",)))


def test_what_goes_in_comes_out(cache):
    stored = put(cache)
    assert cache.get(KEY) == stored
    assert stored.path.read_text() == "weights"
    assert stored.path.is_relative_to(cache.root / "steps" / KEY)
    assert len(stored.digest) == 64
    assert not list((cache.root / "running").iterdir())


@pytest.mark.parametrize(
    "result",
    [
        Verdict(
            "check/size", "onnx", False, "too large", (Measurement("file_bytes", 3.0, "bytes", "measured"),), "try"
        ),
        Measurements((Measurement("latency_p50", None, "ms", "emulated", note="no"),)),
    ],
)
def test_verdicts_and_measurements_come_out_equal(cache, result):
    assert cache.put(KEY, cache.scratch(KEY), result) == result
    assert cache.get(KEY) == result


def test_the_digest_is_over_content_and_signature_only(tmp_path):
    first, second = put(Cache(tmp_path / "a"), "a" * 64), put(Cache(tmp_path / "b"), "b" * 64)
    assert first.digest == second.digest
    assert put(Cache(tmp_path / "c"), text="other").digest != first.digest
    third = Cache(tmp_path / "d")
    folder = third.scratch(KEY)
    (folder / "model.onnx").write_text("weights")
    narrow = replace(SIGNATURE, outputs=())
    assert third.put(KEY, folder, OnnxModel(folder / "model.onnx", narrow)).digest != first.digest


def test_the_key_is_the_same_for_the_same_step(cache):
    assert cache.key(Lower(), {"model": "1"}) == cache.key(Lower(), {"model": "1"})
    assert len(cache.key(Lower(), {})) == 64


@dataclass(frozen=True)
class Renamed(Lower):
    """Another name."""

    name: ClassVar[str] = "lower/other"


@pytest.mark.parametrize(
    ("task", "inputs"),
    [(Lower(bits=4), {"model": "1"}), (Lower(notes=("x",)), {"model": "1"}), (Lower(), {"model": "2"}), (Lower(), {}),
     (Lower(), {"reference": "1"}), (Renamed(), {"model": "1"})],
)  # fmt: skip
def test_the_key_changes_with_options_inputs_and_pass(cache, task, inputs):
    assert cache.key(task, inputs) != cache.key(Lower(), {"model": "1"})


def test_the_key_changes_with_a_tools_version(cache, monkeypatch):
    before = cache.key(Lower(), {})
    monkeypatch.setattr(module, "_version", lambda tool: "99.0")
    assert cache.key(Lower(), {}) != before


def test_the_key_changes_with_edgeships_own_code(cache, monkeypatch):
    before = cache.key(Lower(), {})
    monkeypatch.setattr(module, "code_digest", lambda: "changed")
    assert cache.key(Lower(), {}) != before


def test_the_code_digest_covers_every_source_file(tmp_path):
    package = tmp_path / "edgeship"
    shutil.copytree(Path(module.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from edgeship.engine.cache import code_digest; print(code_digest())"

    def digest() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    first = digest()
    assert digest() == first
    with (package / "compression" / "affine.py").open("a") as file:
        file.write("# changed\n")
    assert digest() != first


def test_the_key_of_a_plug_in_changes_with_its_file(cache, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    text = textwrap.dedent("""
        from dataclasses import dataclass
        from edgeship.core.passes import Pass
        @dataclass(frozen=True)
        class P(Pass):
            name = "lower/plugged"
            @classmethod
            def plan(cls, request): ...
    """)
    (tmp_path / "plugged_for_cache.py").write_text(text)
    import plugged_for_cache

    before = cache.key(plugged_for_cache.P(), {})
    (tmp_path / "plugged_for_cache.py").write_text(text + "# changed\n")
    assert cache.key(plugged_for_cache.P(), {}) != before


ENGINE = """
from edgeship.core.model import OnnxModel
from edgeship.core.runtimes import Runtime
class Engine(Runtime):
    name, title, artifact, packages, extra = "plugged", "Plugged", OnnxModel, ("numpy",), ""
    def open(self, artifact): ...
    def read_weights(self, artifact): return {}
    def holds(self, op, encoding, activations): return ""
"""


def test_the_key_of_a_step_changes_with_the_code_of_the_plug_in_that_it_runs(cache, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "engine_for_cache"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "runtime.py").write_text(ENGINE)
    (package / "kernels.py").write_text("answer = 41\n")
    from engine_for_cache.runtime import Engine

    monkeypatch.setattr(module, "runtimes", lambda: {"plugged": Engine(), **runtimes()})
    steps = [VerifyArtifact("plugged"), CheckAccuracy("plugged"), Benchmark("plugged"), CheckSize("plugged")]
    others = [VerifyArtifact("onnx"), Lower()]
    before = [cache.key(task, {}) for task in (*steps, *others)]
    (package / "kernels.py").write_text("answer = 42\n")
    after = [cache.key(task, {}) for task in (*steps, *others)]
    assert all(one != two for one, two in zip(before[:4], after[:4], strict=True))
    assert before[4:] == after[4:], "steps that run another engine stay as they are"
    monkeypatch.setattr(module, "_version", lambda tool: "99.0" if tool == "numpy" else "1")
    monkeypatch.setattr(Engine, "packages", ())
    without = cache.key(steps[3], {})
    monkeypatch.setattr(Engine, "packages", ("numpy",))
    assert cache.key(steps[3], {}) != without, "the versions of what the engine needs count"


def test_reading_can_be_turned_off(cache):
    put(cache)
    assert Cache(cache.root, read=False).get(KEY) is None
    assert cache.get(KEY) is not None


def damage_size(folder: Path) -> None:
    (folder / "model.onnx").write_text("weight")


def damage_content(folder: Path) -> None:
    time.sleep(0.01)
    (folder / "model.onnx").write_text("Weights")


def remove_file(folder: Path) -> None:
    (folder / "model.onnx").unlink()


@pytest.mark.parametrize("harm", [damage_size, damage_content, remove_file])
def test_a_damaged_entry_is_dropped(cache, harm):
    put(cache)
    harm(cache.root / "steps" / KEY)
    assert cache.get(KEY) is None
    assert not (cache.root / "steps" / KEY).exists()
    assert put(cache) is not None


words = st.sampled_from(["result", "files", "dependencies", "kind", "path", "signature", "OnnxModel", "model.onnx", ""])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)


@given(anything.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20))
def test_no_content_of_a_record_gets_further_than_the_cache(tmp_path_factory, content):
    cache = Cache(tmp_path_factory.getbasetemp() / "damaged")
    put(cache)
    (cache.root / "steps" / KEY / "result.json").write_bytes(content)
    assert cache.get(KEY) is None


def test_a_file_that_the_step_read_counts(cache, tmp_path):
    read = tmp_path / "weights.bin"
    read.write_text("one")
    digest = module.file_digest(read)
    stored = put(cache, dependencies={str(read): digest})
    assert cache.get(KEY) == stored
    assert not (stored.path.parent / "dependencies.json").exists()
    read.write_text("two")
    assert cache.get(KEY) is None
    put(cache, dependencies={str(read): module.file_digest(read)})
    read.unlink()
    assert cache.get(KEY) is None


@pytest.mark.parametrize("read", [True, False])
def test_builds_may_store_the_same_key_at_once(cache, read):
    cache = Cache(cache.root, read)
    put(cache)
    failures, stored = [], []

    def store(number: int) -> None:
        try:
            for turn in range(10):
                folder = cache.root / "running" / f"{number}-{turn}-{os.getpid()}"
                folder.mkdir(parents=True)
                (folder / "model.onnx").write_text("weights")
                stored.append(cache.put(KEY, folder, OnnxModel(folder / "model.onnx", SIGNATURE)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=store, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len({model.digest for model in stored}) == 1
    assert Cache(cache.root).get(KEY).path.read_text() == "weights"
    assert not list((cache.root / "running").iterdir())


def test_a_second_build_leaves_the_entry_that_a_first_one_reads(cache):
    first = put(cache)
    opened = first.path.stat().st_ino
    assert put(cache) == first
    assert first.path.stat().st_ino == opened
    assert put(Cache(cache.root, read=False)) == first
    assert first.path.stat().st_ino != opened


def test_sweeping_drops_what_dead_builds_left_and_spares_the_living(cache):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid(), "odd"):
        (cache.root / "running" / f"abc-{pid}").mkdir(parents=True)
    cache.sweep()
    assert [item.name for item in (cache.root / "running").iterdir()] == [f"abc-{os.getpid()}"]


def test_sweeping_drops_the_oldest_use_first(cache):
    for number, key in enumerate("abc"):
        put(cache, key * 64)
        os.utime(cache.root / "steps" / (key * 64), (1000 + number, 1000 + number))
    cache.get("a" * 64)
    one = module.total_bytes(cache.root / "steps" / ("a" * 64))
    cache.sweep(2 * one)
    assert {item.name[0] for item in (cache.root / "steps").iterdir()} == {"a", "c"}
    cache.sweep(0)
    assert not list((cache.root / "steps").iterdir())


def test_the_limit_can_be_set(cache, monkeypatch):
    put(cache)
    monkeypatch.setenv("EDGESHIP_CACHE_MAX", "1GB")
    cache.sweep()
    assert cache.get(KEY) is not None
    monkeypatch.setenv("EDGESHIP_CACHE_MAX", "1")
    cache.sweep()
    assert cache.get(KEY) is None
    monkeypatch.setenv("EDGESHIP_CACHE_MAX", "much")
    with pytest.raises(UsageError, match="'much' is not a size"):
        cache.sweep()


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set EDGESHIP_CACHE to another folder"):
        Cache(tmp_path / "file").scratch(KEY)


def test_the_variable_says_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESHIP_CACHE", str(tmp_path))
    assert default_cache_root() == tmp_path
    monkeypatch.delenv("EDGESHIP_CACHE")
    assert default_cache_root().name == "edgeship"


def test_a_model_comes_back_as_its_own_class(cache):
    folder = cache.scratch(KEY)
    (folder / "program").mkdir()
    (folder / "program" / "program.json").write_text("{}")
    stored = cache.put(KEY, folder, TorchModel(folder / "program", SIGNATURE))
    assert type(cache.get(KEY)) is TorchModel
    assert stored.path == cache.root / "steps" / KEY / "program"
