"""Every target file: it reads, each fact has a source, and the figures are of the right order."""

import tomllib
from pathlib import Path

import pytest

from edgeship.core.model import Artifact
from edgeship.core.records import from_plain, read_toml
from edgeship.core.target import Fact, Target
from edgeship.errors import UsageError

FILES = sorted((Path(__file__).parents[2] / "targets").glob("*.toml"))
RUNTIMES = {cls.runtime for cls in Artifact.__subclasses__()}
PALETTES = {f"palette{bits}" for bits in (1, 2, 3, 4, 6, 8)}
ENCODINGS = {"float32", "float16", "int8", "int4", "int3", "int2", "sparse", *PALETTES}
TRUST = {"measured", "vendor", "reported", "derived"}
NAMES = {
    "iphone15pro", "iphone16pro", "iphone17pro", "galaxy-s23", "galaxy-s24", "galaxy-s25", "snapdragon-8-elite-gen5",
    "pixel8", "pixel9", "raspberrypi5", "dragonwing-iq9075", "linux-x86",
}  # fmt: skip

each_target = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def facts(target: Target) -> dict[str, Fact]:
    named = {key: getattr(target, key) for key in ("chip", "os", "runtimes", "app_memory_bytes", "bandwidth_bytes_s")}
    for table in ("peak_ops_s", "encodings", "settings"):
        named |= {f"{table}.{key}": fact for key, fact in getattr(target, table).items()}
    return named


def test_the_promised_targets_are_there():
    assert {path.stem for path in FILES} >= NAMES


@each_target
def test_reads_under_its_own_name(path):
    assert read_toml(Target, path).name == path.stem


@each_target
def test_every_fact_has_a_source_and_a_trust(path):
    for key, fact in facts(read_toml(Target, path)).items():
        assert len(fact.source) >= 20, key
        assert fact.trust in TRUST, key
        if fact.trust == "derived" and isinstance(fact.value, (int, float)):
            assert any(character.isdigit() for character in fact.source), f"{key} does not show its derivation"


@each_target
def test_runtimes_are_known_and_each_has_its_encodings(path):
    target = read_toml(Target, path)
    assert target.runtime_names
    assert set(target.runtime_names) <= RUNTIMES
    assert len(set(target.runtime_names)) == len(target.runtime_names)
    assert set(target.encodings) == set(target.runtime_names)
    for fact in target.encodings.values():
        assert set(fact.value) <= ENCODINGS
        assert {"float16", "int8"} <= set(fact.value)


@each_target
def test_figures_are_of_the_right_order(path):
    target = read_toml(Target, path)
    assert 1e9 <= target.app_memory_bytes.value <= 64e9
    assert 10e9 <= target.bandwidth_bytes_s.value <= 200e9
    for key, fact in target.peak_ops_s.items():
        unit, _, dtype = key.partition(".")
        assert unit in {"npu", "gpu", "cpu"}
        assert dtype in {"int8", "f16", "f32"}
        assert 1e11 <= fact.value <= 1e14


@each_target
def test_a_runtime_has_the_settings_it_needs(path):
    target = read_toml(Target, path)
    if "coreml" in target.runtime_names:
        assert target.setting("coreml.minimum_deployment_target") == f"iOS{target.os.value[0]}" or (
            int(target.os.value[0]) > int(target.setting("coreml.minimum_deployment_target").removeprefix("iOS"))
        )
    if "qnn" in target.runtime_names:
        assert target.setting("qnn.soc_model") > 0
        assert target.setting("qnn.htp_arch") in {73, 75, 79, 81}
        assert {"npu.int8", "npu.f16"} <= set(target.peak_ops_s)


def test_iphone15pro_gives_an_app_three_gigabytes():
    path = next(path for path in FILES if path.stem == "iphone15pro")
    assert read_toml(Target, path).app_memory_bytes.value == 3_000_000_000


@pytest.mark.parametrize("source", ["", "   ", "x"])
def test_a_fact_without_a_source_is_refused(source):
    plain = tomllib.loads(FILES[0].read_text())
    plain["bandwidth_bytes_s"]["source"] = source
    with pytest.raises(UsageError, match="has no source"):
        from_plain(Target, plain)


def test_a_fact_that_leaves_its_source_out_is_refused():
    plain = tomllib.loads(FILES[0].read_text())
    del plain["bandwidth_bytes_s"]["source"]
    with pytest.raises(UsageError, match="source"):
        from_plain(Target, plain)
