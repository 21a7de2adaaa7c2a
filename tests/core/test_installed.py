"""Ranges, tested versions and what exists for a system, read from metadata as pip reads it."""

import platform
import sys
import tomllib
from importlib import metadata

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.metadata.spec import construct_metadata_file_2_4
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from edgeship.core import installed
from edgeship.core.installed import Wanted, read_constraints, read_requirements, remarks
from edgeship.core.registry import runtimes
from edgeship.errors import MissingToolError


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module", params=["as written", "as built"])
def lines(request, project, root):
    """``Requires-Dist`` as build backends write it: with extras that name other extras, or written out by hatchling."""
    if request.param == "as built":
        text = construct_metadata_file_2_4(ProjectMetadata(str(root), PluginManager()))
        return [
            line.removeprefix("Requires-Dist: ") for line in text.splitlines() if line.startswith("Requires-Dist: ")
        ]
    found = list(project["dependencies"])
    for extra, items in project["optional-dependencies"].items():
        for item in items:
            name, _, marker = item.partition(";")
            ours = f'extra == "{extra}"'
            found.append(f"{name.strip()}; ({marker.strip()}) and {ours}" if marker else f"{name}; {ours}")
    return found


@pytest.fixture
def metadata_of_here(monkeypatch, lines):
    """The metadata of this checkout, whatever the environment was installed from."""
    monkeypatch.setattr(metadata, "requires", lambda name: lines)


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")


def test_every_distribution_of_a_runtime_is_in_its_extra(lines):
    found = read_requirements(lines, {})
    names = {canonicalize_name(item.name) for item in found}
    for runtime in runtimes().values():
        assert {canonicalize_name(name) for name in runtime.packages} <= names, runtime.name
        assert runtime.engine.extra in {item.extra for item in found}
    assert "torch" in {item.name for item in found if not item.extra}
    assert not {"pytest", "ruff", "django"} & names  # what work on edgeship takes
    homes = {item.name: item.extra for item in found}
    assert len(homes) == len(found)
    for name, extra in {"onnxruntime": "onnx", "ai-edge-litert": "tflite", "transformers": "huggingface"}.items():
        assert homes[name] == extra


def test_the_tested_set_is_within_the_ranges_and_holds_all_of_them(project, root):
    pins = read_constraints(root / "constraints" / "tested.txt")
    asked = [*project["dependencies"]]
    for items in project["optional-dependencies"].values():
        asked += items
    for item in map(Requirement, asked):
        if item.name not in ("edgeship", "django"):
            assert item.specifier.contains(pins[canonicalize_name(item.name)], prereleases=True), str(item)


def test_the_ranges_start_where_the_oldest_set_is_and_reach_the_newest(lines, root):
    ranges = {canonicalize_name(item.name): SpecifierSet(item.versions) for item in read_requirements(lines, {})}
    oldest, newest = (read_constraints(root / "constraints" / f"{name}.txt") for name in ("oldest", "newest"))
    assert len(oldest.keys() & ranges.keys()) > 9
    for name, version in oldest.items():
        if name not in ranges:
            continue  # held back for another package's sake
        (lower,) = [Version(item.version) for item in ranges[name] if item.operator == ">="]
        assert Version(version).release[: len(lower.release)] == lower.release, name
    for name in newest.keys() & ranges.keys():
        assert ranges[name].contains(newest[name]), name


@pytest.mark.parametrize(
    ("there", "tested", "said"),
    [
        ("2.13.0", ("2.13.0", "2.14.1"), ""),
        ("2.13.0+cpu", ("2.13.0",), ""),
        ("2.13.0+cu130", ("2.13.0",), ""),
        ("2.11.0", ("2.13.0", "2.14.1"), "torch 2.11.0 was not tested; tested: 2.13.0, 2.14.1"),
        ("2.15.0", ("2.13.0",), 'torch 2.15.0 is outside of what edgeship takes (<2.15,>=2.9); pip install "torch<2.15,>=2.9"'),
        ("2.8.0", ("2.8.0",), 'torch 2.8.0 is outside of what edgeship takes (<2.15,>=2.9); pip install "torch<2.15,>=2.9"'),
        ("no version", ("2.8.0",), 'torch no version is outside of what edgeship takes (<2.15,>=2.9); pip install "torch<2.15,>=2.9"'),
        ("2.11.0", (), ""),
    ],
)  # fmt: skip
def test_a_version_is_remarked_on_once(there, tested, said):
    assert remarks([Wanted("torch", "", "<2.15,>=2.9", True, there, tested)]) == ([said] if said else [])


@pytest.mark.parametrize(
    ("torchao", "torch", "said"),
    [
        (
            "0.18.0",
            "2.9.1+cu128",
            ['torchao 0.18.0 does not load beside torch 2.9.1+cu128; pip install "torchao<0.18"'],
        ),
        ("0.17.0", "2.9.1", []),
        ("0.18.0", "2.10.0", []),
        ("0.18.0", "", []),
        ("", "2.9.1", []),
    ],
)
def test_what_does_not_load_beside_another_is_told(monkeypatch, torchao, torch, said):
    """transformers imports torchao wherever it is installed."""
    there = {"torchao": torchao, "torch": torch}
    monkeypatch.setattr(installed, "_installed", there.get)
    assert installed.clashes() == said


def test_what_is_missing_is_told_by_its_extra():
    rows = [
        Wanted("rich", "", ">=13", True, ""),
        Wanted("coreai-torch", "coreai", "", True, ""),
        Wanted("coreai-core", "coreai", "", True, ""),
        Wanted("onnx", "onnx", "", True, "1.23.2"),
    ]
    assert remarks(rows) == [
        'not installed: rich; pip install "edgeship"',
        'not installed: coreai-torch, coreai-core; pip install "edgeship[coreai]"',
    ]


def test_on_a_mac_qnn_alone_cannot_be_had(metadata_of_here, mac):
    assert {item.name for item in installed.wanted() if not item.offered} == {"onnxruntime-qnn"}
    assert installed.not_offered("onnxruntime_qnn") == "onnxruntime-qnn is not published for macOS arm64"
    assert installed.not_offered("coremltools") == installed.not_offered("no-such-thing") == ""


def test_on_linux_for_arm_the_converters_cannot_be_had(metadata_of_here, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    absent = {item.extra for item in installed.wanted() if not item.offered}
    assert absent == {"coreml", "coreai", "tflite", "qnn"}
    assert not installed.not_offered("onnxruntime")


def test_a_runtime_that_cannot_be_had_here_says_so(metadata_of_here, mac, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(MissingToolError) as caught:
        runtimes()["qnn"].versions()
    reason = "onnxruntime-qnn is not published for macOS arm64"
    assert caught.value.what == f"QNN (Hexagon) does not work here: {reason}"
    assert "--runtime" in caught.value.fix
    assert runtimes()["qnn"].unpublished() == reason
    assert runtimes()["coreml"].unpublished() == ""
    with pytest.raises(MissingToolError) as caught:
        runtimes()["coreml"].versions()
    assert caught.value.fix == 'pip install "edgeship[coreml]"'


def test_doctor_says_what_is_not_the_tested_set(cli, monkeypatch):
    monkeypatch.setattr(installed, "tested_versions", lambda: {"torch": ("1.0",)})
    out = " ".join(cli("doctor").out.split())
    assert f"torch {metadata.version('torch')} was not tested; tested: 1.0" in out


def test_without_an_installation_there_is_nothing_to_say(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert installed.wanted() == ()
    assert installed.not_offered("onnxruntime-qnn") == ""
