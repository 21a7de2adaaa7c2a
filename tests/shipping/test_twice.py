"""Building twice from the same input, each time with an empty cache, gives the same artifacts byte for byte."""

import json
from pathlib import Path

import pytest

from edgeship.core.artifact import MANIFEST


def artifacts(bundle: Path) -> dict[str, dict]:
    return {record["main"]: record for record in json.loads((bundle / MANIFEST).read_text())["artifacts"]}


def assert_same(first: Path, second: Path) -> None:
    one, two = artifacts(first), artifacts(second)
    assert one.keys() == two.keys()
    for main, record in one.items():
        same = record["files"] == two[main]["files"]
        assert same or len(record["reproducible"]) > 20, f"{main} differs, and the manifest does not say why"
        assert two[main]["reproducible"] == record["reproducible"]


def test_one_runtime(cli_process, tiny_order, tiny_bundle, tmp_path):
    """The second time in another process, whose hashes are others, and with a cache of its own."""
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": "5"}
    ran = cli_process("build", *tiny_order, "-o", "two", env=env)
    assert ran.code == 0, ran.err
    assert_same(tiny_bundle, tmp_path / "two")
    one, two = (json.loads((place / MANIFEST).read_text()) for place in (tiny_bundle, tmp_path / "two"))
    assert one["source"] == two["source"]
    assert one["plan"] == two["plan"]
    assert (tiny_bundle / "inventory.json").read_bytes() == (tmp_path / "two" / "inventory.json").read_bytes()


@pytest.mark.xdist_group("digits")
@pytest.mark.heavy
def test_all_five(cli_process, digits_bundle, root, tmp_path):
    phones = ("--target", "iphone15pro", "--target", "galaxy-s24")
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": "5"}
    ran = cli_process("build", root / "samples" / "digits_cnn", *phones, "-o", "two", env=env)
    assert ran.code == 0, ran.err
    assert len(artifacts(digits_bundle)) == 5
    assert_same(digits_bundle, tmp_path / "two")
