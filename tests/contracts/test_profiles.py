"""Every profile file: it reads, its choices can be carried out, and each exception says why."""

from pathlib import Path
from typing import get_args

import pytest

from edgeship.core.encodings import encoding_named, short_name
from edgeship.core.forms import ActivationMode
from edgeship.core.model import Artifact
from edgeship.core.profile import Profile
from edgeship.core.records import read_toml

FILES = sorted((Path(__file__).parents[2] / "profiles").glob("*.toml"))
RUNTIMES = {cls.runtime for cls in Artifact.__subclasses__()}

each_profile = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_the_promised_profiles_are_there():
    assert {path.stem for path in FILES} >= {"exact", "balanced", "small", "fast", "auto"}


@each_profile
def test_reads_under_its_own_name(path):
    profile = read_toml(Profile, path)
    assert profile.name == path.stem
    assert profile.summary.endswith(".")


@each_profile
def test_choices_are_known(path):
    profile = read_toml(Profile, path)
    for runtime in RUNTIMES:
        choice = profile.choice(runtime)
        names = choice.candidates if choice.weights == "auto" else (choice.weights,)
        assert names
        assert all(short_name(encoding_named(name)) == name for name in names)
        assert choice.activations in get_args(ActivationMode)


@each_profile
def test_each_exception_differs_and_says_why(path):
    profile = read_toml(Profile, path)
    assert set(profile.runtimes) <= RUNTIMES
    assert set(profile.why) == set(profile.runtimes)
    for runtime, choice in profile.runtimes.items():
        assert choice != profile.default
        assert len(profile.why[runtime]) > 20


@each_profile
def test_qnn_gets_integer_weights_only_with_static_activations(path):
    choice = read_toml(Profile, path).choice("qnn")
    assert (choice.weights, choice.activations) == ("float16", "float") or choice.activations in {"int8", "int16"}


@each_profile
def test_the_allowed_drop_is_a_small_fraction(path):
    profile = read_toml(Profile, path)
    assert profile.max_drop is None or 0 < profile.max_drop <= 0.05


def test_a_profile_of_ones_own_names_runtimes_that_there_are(tmp_path):
    from edgeship.api.preparing import _profile
    from edgeship.errors import UsageError

    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nsummary = "x"\n[default]\nweights = "int8"\n[runtimes.onnx]\nweights = "int4"\n')
    assert _profile(str(path)).choice("onnx").weights == "int4"
    path.write_text(path.read_text().replace("runtimes.onnx", "runtimes.onxx"))
    with pytest.raises(UsageError, match='no runtime "onxx"'):
        _profile(str(path))
