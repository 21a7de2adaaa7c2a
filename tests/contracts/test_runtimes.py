"""What every runtime keeps: it says what it can hold, which packages it needs, and why it is not timed."""

import subprocess
import sys
from typing import get_args

import pytest

from edgeship.core.choice import Choice
from edgeship.core.encodings import encoding_named, fitted
from edgeship.core.forms import ActivationMode
from edgeship.core.inventory import WeightOp, WeightUse
from edgeship.core.model import Signature, TensorSpec
from edgeship.core.registry import artifacts, kinds, passes, profiles, runtimes, targets
from edgeship.core.runtimes import Runtime
from edgeship.core.weights import Affine, Float
from edgeship.errors import ArtifactError, EncodingError

EVERY = sorted(runtimes().items())
ENCODINGS = (
    Float(32), Float(16),
    *(Affine(bits, even, reach) for bits in (2, 3, 4, 8) for even in (True, False) for reach in ("tensor", "channel")),
    *(Affine(bits, True, "group", 32) for bits in (2, 3, 4, 8)),
)  # fmt: skip


@pytest.fixture(params=EVERY, ids=[name for name, _ in EVERY])
def runtime(request) -> Runtime:
    return request.param[1]


def test_the_five_are_there():
    assert {"coreml", "coreai", "onnx", "tflite", "qnn"} <= set(runtimes())


def test_it_names_itself_and_its_artifact(runtime):
    assert runtimes()[runtime.name] is runtime
    assert runtime.title
    assert type(runtime).__doc__
    assert artifacts()[runtime.artifact.kind] is runtime.artifact
    assert kinds()[runtime.artifact.kind] is runtime.artifact
    assert runtime.artifact.runtime == runtime.name
    assert runtime.engine.execution in ("native", "emulated")
    assert 1_000_000 < runtime.engine.overhead_bytes < 500_000_000


def test_some_pass_makes_what_it_opens(runtime):
    assert any(cls.edges()[1] is runtime.artifact for cls in passes().values())


def test_it_answers_for_every_weight(runtime):
    for op in get_args(WeightOp):
        for encoding in ENCODINGS:
            for activations in get_args(ActivationMode):
                answer = runtime.holds(op, encoding, activations)
                assert isinstance(answer, str)
                assert answer == answer.strip()
                bits = runtime.resident_bits(op, encoding, activations)
                assert encoding.bits <= bits <= 32
                if answer:
                    with pytest.raises(EncodingError, match="cannot hold"):
                        runtime.require(op, encoding, activations)
                else:
                    runtime.require(op, encoding, activations)


@pytest.mark.parametrize("op", ["linear", "conv", "depthwise_conv", "embedding"])
def test_it_holds_what_the_profiles_ask_of_it(runtime, op):
    use = WeightUse("w", op, (64, 64) if op in ("linear", "embedding") else (64, 64, 3, 3))
    for profile in profiles().values():
        choice = profile.choice(runtime.name, runtime.format.name)
        names = choice.candidates if choice.weights == "auto" else (choice.weights,)
        if op == "embedding" and choice.embeddings:
            names = (choice.embeddings,)
        refused = [runtime.holds(op, fitted(encoding_named(name), use), choice.activations) for name in names]
        assert not all(refused), (profile.name, refused)


def test_it_refuses_something(runtime):
    refused = [
        (op, encoding, mode)
        for op in get_args(WeightOp)
        for encoding in ENCODINGS
        for mode in get_args(ActivationMode)
        if runtime.holds(op, encoding, mode)
    ]
    assert refused


def test_targets_list_only_encodings_of_runtimes_that_exist():
    for target in targets().values():
        assert set(target.encodings) <= set(runtimes())
        assert set(target.runtime_names) <= set(runtimes())


def test_it_needs_packages_that_an_extra_brings(runtime, root):
    import tomllib

    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = " ".join(extras[runtime.engine.extra])
    for name in ("onnx", "tflite"):
        if f"edgeship[{name}]" in listed:
            listed += " ".join(extras[name])
    assert runtime.packages
    assert all(package in listed for package in runtime.packages)
    assert f"edgeship[{runtime.engine.extra}]" in " ".join(extras["all"]) or runtime.engine.extra in " ".join(
        extras["all"]
    )


def test_a_runtime_that_is_not_timed_says_why(runtime):
    if runtime.engine.execution == "emulated":
        assert runtime.engine.untimed


def test_its_versions_are_those_installed(runtime):
    found = runtime.versions()
    assert tuple(found) == runtime.packages
    assert all(version[0].isdigit() for version in found.values())


def test_a_file_that_is_not_there_is_damage(runtime, tmp_path):
    signature = Signature((TensorSpec("x", "f32", (1, 4)),), (TensorSpec("y", "f32", (1, 4)),))
    artifact = runtime.artifact(tmp_path / f"gone{runtime.artifact.suffix}", signature)
    with pytest.raises(ArtifactError):
        runtime.open(artifact)


def test_asking_for_runtimes_imports_no_engine():
    code = (
        "import sys; from edgeship.core.registry import runtimes, passes; runtimes(); passes();"
        "print([n for n in ('torch','numpy','onnx','onnxruntime','coremltools','coreai','ai_edge_litert','transformers')"
        " if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_profiles_name_runtimes_that_exist():
    for profile in profiles().values():
        assert set(profile.runtimes) <= set(runtimes())
        assert all(isinstance(choice, Choice) for choice in profile.runtimes.values())
