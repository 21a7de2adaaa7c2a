"""The wheel alone, in an empty environment outside the checkout, builds the sample."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]


def run(*command: object, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(item) for item in command],
        cwd=cwd,
        env={**environment, **extra},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """Built from a clean copy, so that the checkout's own folders do not count."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "source"
    kept = shutil.ignore_patterns(".venv", ".git", "__pycache__", "*.edgeship*", "bundles", ".*_cache", "dist", "*.log")
    shutil.copytree(root, copy, ignore=kept)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, copy, cwd=place)
    (made,) = place.glob("*.whl")
    return made


def test_the_wheel_holds_targets_profiles_schemas_and_types(wheel):
    import zipfile

    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "edgeship/targets/iphone15pro.toml", "edgeship/profiles/balanced.toml", "edgeship/schemas/manifest.schema.json",
        "edgeship/cli/main.py", "edgeship/passes/load/torch.py", "edgeship/py.typed", "edgeship/constraints/tested.txt",
    ):  # fmt: skip
        assert name in names
    assert not any(name.startswith(("tests/", "samples/", "benchmarks/")) for name in names)
    (metadata,) = [name for name in names if name.endswith("METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    for extra in ("onnx", "coreml", "coreai", "tflite", "qnn", "all"):
        assert f"Provides-Extra: {extra}" in text


def test_it_builds_the_sample_from_an_empty_environment(wheel, root, tmp_path):
    if shutil.disk_usage(tmp_path).free < 8 * 1000**3:
        pytest.skip("an environment with torch needs 8 GB")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python, edgeship = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "edgeship"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    tested = root / "constraints" / "tested.txt"
    run(*pip, "install", "--quiet", "--constraint", tested, f"{wheel}[onnx]", cwd=tmp_path)
    shutil.copytree(root / "samples" / "digits_cnn", tmp_path / "digits_cnn")
    cache = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    place = run(python, "-c", "import edgeship; print(edgeship.__file__)", cwd=tmp_path).stdout
    assert "site-packages" in place
    assert "iphone15pro" in run(edgeship, "targets", "--json", cwd=tmp_path, **cache).stdout
    listed = {row["name"]: row["ok"] for row in json.loads(run(edgeship, "runtimes", "--json", cwd=tmp_path).stdout)}
    assert {"coreai", "coreml", "qnn", "tflite", "genai", "litert-lm"} <= listed.keys()
    assert [name for name, there in listed.items() if there] == ["onnx"]
    remarks = json.loads(run(edgeship, "doctor", "--json", cwd=tmp_path, **cache).stdout)["packages"]
    assert remarks
    assert all(remark.startswith("not installed: ") for remark in remarks)
    assert not any("onnx]" in remark for remark in remarks)
    # Away from the checkout, a sample is a stranger.
    order = ("digits_cnn", "--trust", "--target", "linux-x86", "--runtime", "onnx", "-o", "out", "--json")
    report = json.loads(run(edgeship, "build", *order, cwd=tmp_path, **cache).stdout)
    assert report["passed"] is True
    assert "is whole" in run(edgeship, "verify", "out", cwd=tmp_path, **cache).stdout
    run(*pip, "check", cwd=tmp_path)
