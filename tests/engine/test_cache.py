"""Results are kept under everything that decides them: the same key gives them back, any change does not."""

import gc
import json
import os
import random
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
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killing import Killed, deadly

from edgeship.core.model import OnnxModel, Signature, TensorSpec, TorchModel
from edgeship.core.owned import LINE, MARKER
from edgeship.core.passes import Pass, Skip
from edgeship.core.registry import runtimes
from edgeship.core.report import Measurement, Measurements, Verdict
from edgeship.engine import cache as module
from edgeship.engine.cache import RESULT, Cache, default_cache_root
from edgeship.engine.chatter import Log, write_crash
from edgeship.errors import ChangedError, OutputError, UsageError
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
    assert list((cache.root / "running").iterdir()) == []
    assert put(cache) is not None


def flip(path: Path, bit: int) -> None:
    """Turn one bit over, and give the file its times back, as a disk that forgets does."""
    found, content = path.stat(), bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@given(
    place=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["model.onnx", "data/weights.bin", RESULT, MARKER])
)
def test_every_flipped_bit_is_found(tmp_path_factory, place, name):
    """In whichever file of an entry: what comes back is what went in, or nothing does and the step runs again."""
    cache = Cache(tmp_path_factory.mktemp("flipped"))
    folder = cache.scratch(KEY)
    (folder / "data").mkdir()
    (folder / "data" / "weights.bin").write_bytes(bytes(range(100)))
    (folder / "model.onnx").write_text("graph")
    model = OnnxModel(folder / "model.onnx", SIGNATURE, files=("model.onnx", "data/weights.bin"), facts={"a": "b"})
    stored = cache.put(KEY, folder, model)
    cache.close()
    path = cache.root / "steps" / KEY / name
    flip(path, int(place * 8 * path.stat().st_size))
    found = cache.get(KEY)
    assert found is None or (found == stored and name in (RESULT, MARKER))
    if name == MARKER:
        assert found == stored  # the record proves as much as the marker, which is written anew
    if name in ("model.onnx", "data/weights.bin"):
        assert found is None
        assert put(cache).path.read_text() == "weights"
    cache.close()


def test_a_flipped_bit_in_a_verdict_is_found(cache):
    """No figure of a report is ever another."""
    verdict = Verdict("check/verify", "onnx", True, "ok", (Measurement("snr", 92.6, "dB", "measured"),))
    cache.put(KEY, cache.scratch(KEY), verdict)
    path = cache.root / "steps" / KEY / RESULT
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 13):
        cache.close()
        if not path.exists():
            cache.put(KEY, cache.scratch(KEY), verdict)
        flip(path, bit)
        assert cache.get(KEY) in (None, verdict)
        if path.exists():
            path.write_bytes(content)


def test_a_model_that_changed_while_it_was_used_is_found(cache):
    stored = put(cache)
    cache.check(stored)
    flip(stored.path, 3)
    with pytest.raises(ChangedError, match="changed while the build used it"):
        cache.check(stored)
    assert cache.get(KEY) is None
    again = put(cache)
    cache.check(again)
    (again.path.parent / RESULT).write_text("{}")
    with pytest.raises(ChangedError, match="changed while the build used it"):
        cache.check(again)


def test_digests_are_those_that_were_stored(cache):
    stored = put(cache)
    assert cache.digests(stored) == {stored.path: module.source_digest(stored.path)}
    shutil.rmtree(stored.path.parent)
    with pytest.raises(ChangedError, match="no longer in the cache"):
        cache.digests(stored)


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
    digest = module.source_digest(read)
    stored = put(cache, dependencies={str(read): digest})
    assert cache.get(KEY) == stored
    assert not (stored.path.parent / "dependencies.json").exists()
    read.write_text("two")
    assert cache.get(KEY) is None
    put(cache, dependencies={str(read): module.source_digest(read)})
    read.unlink()
    assert cache.get(KEY) is None


@pytest.mark.parametrize("read", [True, False])
def test_builds_may_store_the_same_key_at_once(cache, read):
    put(cache)
    cache.close()
    failures, stored = [], []

    def store() -> None:
        try:
            for _ in range(10):
                own = Cache(cache.root, read)
                model = put(own)
                assert model.path.read_text() == "weights"
                stored.append(model)
                own.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=store) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len({model.digest for model in stored}) == 1
    assert Cache(cache.root).get(KEY).path.read_text() == "weights"
    assert not list((cache.root / "running").iterdir())


def test_a_build_that_reads_nothing_puts_its_result_in_place_of_an_old_one(cache):
    first = put(cache)
    old = first.path.stat().st_ino
    cache.close()
    assert put(Cache(cache.root, read=False)) == first
    assert first.path.stat().st_ino != old


def test_an_entry_that_another_build_uses_stays_as_it_is(cache):
    first = put(cache)
    old = first.path.stat().st_ino
    assert put(cache) == first
    own = Cache(cache.root, read=False)
    second = put(own)
    assert second.digest == first.digest
    assert second.path != first.path
    assert own.digests(second).keys() == {second.path}
    own.check(second)
    cache.sweep(0)
    assert first.path.stat().st_ino == old
    assert second.path.read_text() == "weights"
    own.close()
    assert not list((cache.root / "running").iterdir())


def test_sweeping_drops_what_dead_builds_left_and_spares_the_living(cache, tmp_path):
    code = """
        import os, sys, time
        from pathlib import Path
        from edgeship.engine.cache import Cache
        cache = Cache(Path(sys.argv[1]))
        folder = cache.scratch("s" * 64)
        (folder / "half").write_text("ours")
        if sys.argv[2] == "die":
            os.kill(os.getpid(), 9)
        print(folder.parent.name, flush=True)
        time.sleep(100)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(cache.root)]
    subprocess.run([*command, "die"], check=False)
    living = subprocess.Popen([*command, "live"], stdout=subprocess.PIPE, text=True)
    try:
        name = living.stdout.readline().strip()
        assert len(list((cache.root / "running").iterdir())) == 2
        cache.sweep()
        assert [item.name for item in (cache.root / "running").iterdir()] == [name]
    finally:
        living.kill()
        living.wait()
    cache.sweep()
    assert list((cache.root / "running").iterdir()) == []


names = st.sampled_from(
    ["running/abc-1/file", "running/file", "running/job-99999/.edgeship", "steps/notes/file", f"steps/{KEY}/model.onnx",
     f"steps/{'0' * 64}/{RESULT}", "texts/a.npz", "last.log", "logs/crash-1.log", "logs/last.log", "photos/a.jpg",
     f"steps/{KEY}/{MARKER}", "locks/a"]
)  # fmt: skip
contents = st.sampled_from([b"", b"{}", b"mine", b'{"sha256": "", "stored": {"files": {"file": ""}}}', LINE + b"x"])


@settings(deadline=None, max_examples=50)
@given(files=st.dictionaries(names, contents, max_size=6))
def test_files_of_others_in_the_folder_stay(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("theirs")
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    cache = Cache(root)
    for key in (KEY, "0" * 64, "1" * 64):
        stored = put(cache, key)
        assert stored.path.read_text() == "weights"
        assert stored.digest
        cache.get(key)
    write_crash(root / "logs", "text")
    Log(root / "last.log").line("text")
    cache.sweep(0)
    cache.close()
    cache.sweep(0)
    for name, content in files.items():
        assert (root / name).read_bytes() == content


def test_a_file_of_others_in_an_entry_stays(cache):
    stored = put(cache)
    cache.close()
    theirs = stored.path.parent / "notes.txt"
    theirs.write_text("theirs")
    cache.sweep(0)
    assert theirs.read_text() == "theirs"
    flip(stored.path, 1)
    assert cache.get(KEY) is None
    cache.sweep(0)
    again = put(cache)
    assert again.path.read_text() == "weights"
    cache.close()
    cache.sweep(0)
    assert [path.read_text() for path in cache.root.rglob("notes.txt")] == ["theirs"]


def test_sweeping_drops_the_oldest_use_first(cache):
    for number, key in enumerate("abc"):
        put(cache, key * 64)
        os.utime(cache.root / "steps" / (key * 64), (1000 + number, 1000 + number))
    cache.get("a" * 64)
    one = module.total_bytes(cache.root / "steps" / ("a" * 64))
    cache.close()
    cache.sweep(2 * one)
    assert {item.name[0] for item in (cache.root / "steps").iterdir()} == {"a", "c"}
    cache.sweep(0)
    assert not list((cache.root / "steps").iterdir())


def test_an_entry_in_use_is_not_evicted(cache):
    stored = put(cache)
    Cache(cache.root).sweep(0)
    assert stored.path.read_text() == "weights"
    reader = Cache(cache.root)
    assert reader.get(KEY) == stored
    cache.close()
    cache.sweep(0)
    assert stored.path.read_text() == "weights"
    reader.close()
    cache.sweep(0)
    assert not stored.path.exists()


def test_the_limit_can_be_set(cache, monkeypatch):
    put(cache)
    monkeypatch.setenv("EDGESHIP_CACHE_MAX", "1GB")
    cache.sweep()
    assert cache.get(KEY) is not None
    cache.close()
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


def test_windows_of_a_text_are_made_once_and_again_when_damaged(cache, monkeypatch):
    made = []

    def make(folder: Path) -> Path:
        made.append(folder)
        (folder / "windows.npz").write_bytes(b"tokens")
        return folder / "windows.npz"

    path = cache.windows({"text": "1"}, make)
    assert cache.windows({"text": "1"}, make) == path
    assert len(made) == 1
    assert cache.windows({"text": "2"}, make) != path
    flip(path, 9)
    assert cache.windows({"text": "1"}, make).read_bytes() == b"tokens"
    assert len(made) == 3
    monkeypatch.setattr(module, "_version", lambda tool: "99.0")
    assert cache.windows({"text": "1"}, make) != path


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.heavy), pytest.param(2, marks=pytest.mark.heavy)]
)
def test_flipped_bits_in_the_entries_of_a_build_never_ship(cli, tiny_order, tmp_path, seed):
    """A bit in a file of every entry (loaded, quantized and lowered models, verdicts, figures), then all again."""
    chance = random.Random(seed)
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    order = [*tiny_order[:-1], "onnx,tflite", "-o", "out"]
    ran = cli("build", *order, env=env)
    assert ran.code == 0, ran.err
    bundle = tmp_path / "out"
    files = {path: path.read_bytes() for path in bundle.rglob("model.*")}
    kinds = set()
    for entry in sorted((tmp_path / "cache" / "steps").iterdir()):
        kinds.add(json.loads((entry / RESULT).read_text())["stored"]["result"]["kind"])
        path = chance.choice([path for path in sorted(entry.rglob("*")) if path.is_file() and path.stat().st_size])
        flip(path, chance.randrange(8 * path.stat().st_size))
    assert kinds == {"TorchModel", "OnnxModel", "TFLiteModel", "verdict", "measurements"}
    ran = cli("build", *order, env=env)
    assert ran.code == 0, ran.err
    assert {path: path.read_bytes() for path in bundle.rglob("model.*")} == files
    assert cli("verify", "out").code == 0


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(
    "first", [0, pytest.param(1, marks=pytest.mark.heavy), pytest.param(2, marks=pytest.mark.heavy)]
)
def test_killed_at_every_moment(tmp_path, first):
    """A build that stores, replaces, drops and evicts is killed; the next one finds what was stored, or nothing."""
    moment, done = first, False
    while not done:
        root = tmp_path / str(moment)
        put(Cache(root))
        put(Cache(root), "o" * 64)
        with pytest.MonkeyPatch.context() as patch:
            deadly(patch, moment, (Path, "write_text"))
            try:
                build(root)
                done = True
            except Killed:
                pass
        # What the dead build held open; the libraries that are loaded here were frozen.
        gc.collect()
        cache = Cache(root)
        cache.sweep()
        # An empty folder proves nothing: one that was killed between its marker and itself stays.
        assert [path for path in (root / "running").rglob("*") if path.is_file()] == []
        for key in (KEY, "o" * 64, "n" * 64):
            found = cache.get(key)
            assert found is None or found.path.read_text() == "weights"
            assert put(cache, key).path.read_text() == "weights"
            assert (root / "steps" / key / RESULT).is_file()
        cache.close()
        moment += 3
    assert moment > 20


def build(root: Path) -> None:
    cache = Cache(root, read=False)
    put(cache, "n" * 64)
    put(cache)
    cache.discard(cache.scratch("x" * 64))
    cache.close()
    (root / "steps" / KEY / "model.onnx").write_bytes(b"damaged")
    Cache(root).get(KEY)
    Cache(root).sweep(0)
