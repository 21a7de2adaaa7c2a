"""The page of other environments is what its record says; what `check_environment.py` refuses."""

import importlib.util
import json

import pytest


@pytest.fixture(scope="module")
def script(root):
    place = root / "scripts" / "check_environment.py"
    spec = importlib.util.spec_from_file_location("check_environment", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_records(script):
    assert script.PAGE.read_text() == script.page(json.loads(script.RECORD.read_text()))


def test_torch_beside_torchvision_stays_and_builds_for_four_runtimes(script):
    rows = json.loads(script.RECORD.read_text())
    (row,) = [row for row in rows.values() if "torchvision==0.29.1" in row["before"]]
    assert {f"{name}=={row['versions'][name]}" for name in ("torch", "torchvision")} == set(row["before"])
    assert row["network"].keys() == set(script.RUNTIMES)
    assert all("weights read back equal" in summary for summary in row["network"].values())


def test_versions_are_compared_with_the_tested_set(script, root):
    tested = script.read_constraints(root / "constraints" / "tested.txt")
    assert script.other_versions({"torch": f"{tested['torch']}+cpu", "sqlite-vec": "1"}) == []
    assert script.other_versions({"torch": "2.9.1", "Jinja2": tested["jinja2"]}) == [f"torch 2.9.1 ({tested['torch']})"]


def test_an_installation_that_moves_what_was_there_is_refused(script, tmp_path, monkeypatch):
    """pip stands in: before the wheel it has one torch, after it another."""
    seen = iter([{}, {"torch": "2.14.1"}, {"torch": "2.13.0", "edgeship": "0.1.0"}])

    class Moved(script.Environment):
        def __init__(self):
            self.folder = tmp_path

        def run(self, *command, check=True):
            (tmp_path / "wheels").mkdir(exist_ok=True)
            (tmp_path / "wheels" / "edgeship-0.1.0-py3-none-any.whl").touch()

        def versions(self):
            return next(seen)

    with pytest.raises(SystemExit, match=r"changed what was there.*2\.14\.1.*2\.13\.0"):
        script.install(Moved(), ["torch==2.14.1"], None)
