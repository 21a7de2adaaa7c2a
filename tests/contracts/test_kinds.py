"""What is registered is known everywhere: the kinds of models follow from runtimes and passes, and nothing asks by name."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeship.core import plugins, registry
from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.memory import predict
from edgeship.core.model import Artifact, Model, OnnxModel, Signature, TensorSpec, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.records import from_plain, to_plain
from edgeship.core.runtimes import Engine, Format
from edgeship.devices.estimate import estimate
from edgeship.engine.cache import Cache
from edgeship.errors import ArtifactError

ROOT = Path(__file__).parents[2]
SIGNATURE = Signature((TensorSpec("x", "f32", (1, 4)),), (TensorSpec("y", "f32", (1, 4)),))
FOUND = (registry.passes, registry.runtimes, registry.devices, registry.targets, registry.artifacts, registry.kinds)


@pytest.fixture
def register(monkeypatch):
    """``register(group, name, object)``: as if a package with this entry point were installed, for one test."""
    given: dict[str, list[tuple[str, object]]] = {}

    def points(*, group):
        return [SimpleNamespace(name=name, load=lambda value=value: value) for name, value in given.get(group, [])]

    def forget():
        for function in FOUND:
            function.cache_clear()

    def add(group, name, value):
        given.setdefault(f"edgeship.{group}", []).append((name, value))
        forget()

    monkeypatch.setattr(plugins.metadata, "entry_points", points)
    monkeypatch.setattr(plugins, "_broken", {})
    forget()
    yield add
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="module")
def zipgraph():
    """The classes of the package in tests/plugins, imported from where they lie."""
    place = str(ROOT / "tests" / "plugins" / "zipgraph" / "src")
    sys.path.insert(0, place)
    try:
        from edgeship_zipgraph import lowering, model, runtime
    finally:
        sys.path.remove(place)
    return SimpleNamespace(
        Model=model.ZipGraphModel, targets=model.targets_folder, Pass=lowering.TorchToZipGraph,
        runtime=runtime.RUNTIME, Runtime=type(runtime.RUNTIME), FORMAT=runtime.FORMAT,
    )  # fmt: skip


@pytest.fixture
def registered(register, zipgraph):
    """With that package's runtime, pass and target."""
    register("runtimes", "zipgraph", zipgraph.runtime)
    register("passes", "zipgraph", zipgraph.Pass)
    register("targets", "zipgraph", zipgraph.targets)
    assert not plugins.refused()
    return zipgraph


def test_every_runtime_says_its_kind_and_every_pass_makes_a_known_one():
    made = [cls.edges()[1] for cls in registry.passes().values()]
    for kind in (cls for cls in made if isinstance(cls, type) and issubclass(cls, Model)):
        assert registry.kinds()[kind.kind] is kind
    assert set(registry.artifacts()) == {runtime.artifact.kind for runtime in registry.runtimes().values()}
    assert registry.artifacts().items() <= registry.kinds().items()


def test_the_cache_reads_what_a_package_makes(registered, tmp_path):
    cache = Cache(tmp_path / "cache")
    folder = cache.scratch("0" * 64)
    (folder / "model.zipgraph").write_bytes(b"anything")
    made = registered.Model(folder / "model.zipgraph", SIGNATURE, files=("model.zipgraph",), facts={"a": "b"})
    kept = cache.put("0" * 64, folder, made)
    cache.close()
    again = Cache(tmp_path / "cache")
    found = again.get("0" * 64)
    again.close()
    assert type(found) is registered.Model
    assert found == kept
    assert found.path.read_bytes() == b"anything"


def test_the_order_of_the_timing_process_is_read_back(registered, tmp_path):
    artifact = registered.Model(tmp_path / "model.zipgraph", SIGNATURE)
    order = json.loads(json.dumps(to_plain(artifact)))
    assert from_plain(registry.artifacts()[order["kind"]], order) == artifact


def test_a_bundle_holds_it_and_refuses_a_kind_that_its_runtime_does_not_open(registered, tiny_bundle):
    from edgeship.shipping.bundle import _check_record, opened, read_bundle

    bundle = read_bundle(tiny_bundle)
    (record,) = bundle.manifest.artifacts
    other = dataclasses.replace(record, runtime="zipgraph", model_kind="ZipGraphModel", main="zipgraph/model.zipgraph")
    _check_record(tiny_bundle, other)
    assert type(opened(bundle, other)) is registered.Model
    for wrong in (
        dataclasses.replace(record, model_kind="ZipGraphModel"),
        dataclasses.replace(other, model_kind="OnnxModel"),
        dataclasses.replace(other, runtime="nobody"),
    ):
        with pytest.raises(ArtifactError, match="which is not here"):
            _check_record(tiny_bundle, wrong)


def test_memory_and_estimate_ask_it_for_its_figures(registered):
    inventory = Inventory(
        (WeightUse("w", "linear", (100, 100)),), (OpCost("l", "aten.linear", 10_000, 100, 100, ("w",)),), 1000
    )
    found = predict(inventory, registered.runtime, Choice("int8", "float"))
    # Bytes for the integers, 4 for each of 100 scales; float32 in memory.
    assert (found.stored, found.weights, found.activations) == (10_400, 40_000, 4000)
    assert found.runtime == registered.runtime.engine.overhead_bytes
    board = registry.targets()["zipboard"]
    figure = estimate(inventory, board, "zipgraph", Choice("int8", "float"))
    line = registered.runtime.engine.roofline
    computing = 2 * 10_000 / (board.peak_ops_s["cpu.f32"].value * line.efficiency)
    moving = 40_000 / board.bandwidth_bytes_s.value
    assert figure.value == pytest.approx(1000 * (line.run_seconds + max(computing, moving)))


@pytest.mark.parametrize("name", sorted(registry.runtimes()))
def test_nothing_that_is_predicted_of_a_runtime_forgets_it(name):
    """An engine for language models predicts as the engine for networks of its format does."""
    runtime = registry.runtimes()[name]
    network = registry.runtimes()[runtime.format.name]
    inventory = Inventory((WeightUse("b", "other", (1000,)),), (), 10_000)
    for choice in (Choice(weights, mode) for weights in ("float16", "float32") for mode in ("float", "int16")):
        mine, theirs = predict(inventory, runtime, choice), predict(inventory, network, choice)
        assert (mine.stored, mine.activations) == (theirs.stored, theirs.activations)
    assert predict(inventory, runtime, Choice("float16", "int16")).activations == 20_000
    halves = runtime.float_bits(Choice("float16", "float")) == 16
    assert halves == (runtime.format.name in ("coreml", "coreai", "qnn"))
    assert predict(inventory, runtime, Choice("float16", "float")).activations == (20_000 if halves else 40_000)
    assert runtime.engine.roofline is not None
    assert runtime.engine.roofline == network.engine.roofline


@pytest.mark.parametrize("name", sorted(name for name, item in registry.runtimes().items() if item.engine.for_language))
def test_a_language_model_is_estimated_wherever_its_format_runs(name):
    from edgeship.devices.estimate import estimate_text

    runtime = registry.runtimes()[name]
    inventory = Inventory(
        (WeightUse("w", "linear", (1000, 1000)),), (OpCost("l", "aten.linear", 64 * 10**6, 64, 64, ("w",)),), 1000
    )
    places = [target for target in registry.targets().values() if runtime.runs_on(target)]
    assert places
    known = 0
    for target in places:
        read, written = estimate_text(inventory, target, name, Choice("int8", "dynamic"), 64)
        assert "does not run" not in read.note + written.note
        if written.value is None:
            assert "no figure" in written.note
            continue
        known += 1
        assert read.value > written.value, "reading many tokens at once takes less time for each"
        # No token is written before all weights were read.
        assert written.value <= target.bandwidth_bytes_s.value / 10**6 * 1.001
        assert written.high <= target.bandwidth_bytes_s.value / 10**6 * 1.001
    assert known or all("npu" in estimate_text(inventory, t, name, Choice("int8"), 64)[0].note for t in places)


def named(cls, **members):
    """A subclass of a runtime with other members."""
    return type("Other", (cls,), members)()


def test_the_registry_refuses_what_it_could_not_tell_apart(register, zipgraph):
    @dataclasses.dataclass(frozen=True)
    class Nameless(Artifact):
        runtime = "other"

    @dataclasses.dataclass(frozen=True)
    class Twin(Artifact):
        kind = "OnnxModel"
        runtime = "other"

    @dataclasses.dataclass(frozen=True)
    class Stranger(Artifact):
        kind = "Stranger"
        runtime = "elsewhere"

    @dataclasses.dataclass(frozen=True)
    class Own(Artifact):
        kind = "Own"
        runtime = "other"

    base = zipgraph.Runtime
    bad = {
        "no kind of its own": named(base, name="other", artifact=Nameless),
        "kind of another": named(base, name="other", artifact=Twin),
        "runtime of another": named(base, name="other", artifact=Stranger),
        "format of another": named(base, name="other", artifact=Own, format=Format("onnx", "Other")),
        "no artifact": named(base, name="other", artifact=dict),
        "a name of another": named(base, name="onnx", artifact=Own),
        "not a runtime": object(),
    }
    for name, value in bad.items():
        register("runtimes", name, value)
    found = registry.runtimes()
    assert "other" not in found
    assert type(found["onnx"]).__name__ == "OnnxRuntime"
    assert {item.name for item in plugins.refused()} == set(bad)
    assert all(item.reason for item in plugins.refused())
    register("runtimes", "good", named(base, name="other", artifact=Own, engine=Engine()))
    assert registry.artifacts()["Own"] is Own


def test_a_pass_that_makes_another_model_of_a_known_kind_is_refused(register):
    @dataclasses.dataclass(frozen=True)
    class Twin(Artifact):
        kind = "OnnxModel"
        runtime = "onnx"

    @dataclasses.dataclass(frozen=True)
    class MakesTwin(Pass):
        """Make a model that looks like another."""

        name = "lower/twin"

        @classmethod
        def plan(cls, request):
            return Skip("never planned")

        def run(self, model, ctx):
            raise NotImplementedError

    MakesTwin.run.__annotations__ = {"model": TorchModel, "ctx": Context, "return": Twin}
    register("passes", "twin", MakesTwin)
    assert "lower/twin" not in registry.passes()
    assert registry.kinds()["OnnxModel"] is OnnxModel
    assert [item.reason for item in plugins.refused()] == ["it makes another OnnxModel than there is"]


def test_nothing_asks_for_a_runtime_by_its_name():
    """A name stands where the runtime, its artifact and its passes are, and nowhere else."""
    own = ("runtimes/", "lowering/", "passes/lower/", "core/model.py")
    # A source may be an ONNX file: that is its form.
    forms = {"engine/sources.py", "passes/load/onnx.py"}
    # Python's module of that name.
    modules = {"cli/main.py"}
    names = {*registry.runtimes(), *(runtime.format.name for runtime in registry.runtimes().values())}
    found: list[str] = []
    for path in sorted((ROOT / "edgeship").rglob("*.py")):
        place = path.relative_to(ROOT / "edgeship").as_posix()
        if place.startswith(own) or place in forms | modules:
            continue
        constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found += [f"{place}:{node.lineno} {node.value}" for node in constants if node.value in names]
    assert not found


def test_the_versions_of_what_a_runtime_needs_are_those_of_engine_and_format():
    for runtime in registry.runtimes().values():
        assert set(runtime.packages) == {*runtime.engine.packages, *runtime.format.packages}
        assert set(runtime.versions()) == set(runtime.packages)
        assert all(metadata.version(name) == version for name, version in runtime.versions().items())
