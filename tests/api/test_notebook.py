"""As a notebook does it: a module in memory to a bundle to answers, and no file on disk but the bundle."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import edgeship
from edgeship.errors import ArtifactError, GateError


def small_network():
    """A network whose batch norm and dropout answer otherwise in training."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )
    layers[1].running_mean.uniform_(-0.5, 0.5)
    layers[1].running_var.uniform_(0.5, 2)
    return layers


@pytest.fixture
def alone(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the current one, and another for temporary files."""
    (tmp_path / "here").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def _is_of_libraries(path: Path) -> bool:
    """What importing onnxruntime writes, and the empty folder that torch.export makes, whoever calls them."""
    return path.name == ".ses" or (path.name.startswith("torchinductor_") and not any(path.iterdir()))


def test_five_lines_from_a_module_to_answers(alone):
    import torch

    model = small_network().train()
    image = torch.randn(1, 1, 4, 4)
    bundle = edgeship.build(model, {"image": image}, target="linux-x86", runtime="onnx", weights="float16")
    network = bundle["onnx"].open()
    answer = network(image=image)

    assert model.training, "the module stays as it was"
    with torch.no_grad():
        want = model.eval()(image).numpy()
    np.testing.assert_allclose(answer, want, atol=2e-3)
    assert bundle.passed
    assert bundle.report.rows[0].weights == "float16"
    assert [item.name for item in Path().iterdir()] == ["Sequential.edgeship"]
    assert bundle.path == Path("Sequential.edgeship")
    left = [item for item in (alone / "tmp").iterdir() if not _is_of_libraries(item)]
    assert left == []
    assert bundle.verify() == []
    assert "onnx/model.onnx" in repr(bundle)
    assert edgeship.open_bundle(bundle.path).report == bundle.report


def test_equal_modules_meet_in_the_cache_and_others_do_not(alone):
    """The cache knows graph and weights, not the object; and it is what a factory of the same module gives."""
    import torch

    def cached(model, **more):
        steps = []
        bundle = edgeship.build(
            model, {"image": torch.zeros(1, 1, 4, 4)}, target="linux-x86", runtime="onnx", weights="float16",
            progress=steps.append, **more,
        )  # fmt: skip
        return bundle, {line.split(":")[0] for line in steps if line.endswith("from cache")}

    cached(small_network())
    same, found = cached(small_network())
    assert {"load/memory", "compress/quantize", "lower/torch_to_onnx", "check/verify"} <= found
    other = small_network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1
    changed, found = cached(other)
    assert "load/memory" not in found
    assert "lower/torch_to_onnx" not in found
    names = [{file.path: file.sha256 for file in item["onnx"].record.files} for item in (same, changed)]
    assert names[0] != names[1]
    with pytest.raises(ArtifactError, match=r"Sequential\.edgeship was replaced by another build"):
        same["onnx"].open()
    changed["onnx"].open().close()
    Path("network.py").write_text(
        "import sys\nsys.path.insert(0, " + repr(str(Path(__file__).parent)) + ")\n"
        "def model():\n    from test_notebook import small_network\n    return small_network()\n"
    )
    factory = edgeship.build(
        "network.py:model", "image:f32[1,1,4,4]", target="linux-x86", runtime="onnx", weights="float16"
    )
    again, _ = cached(small_network(), output="again")
    assert factory["onnx"].record.files == again["onnx"].record.files
    assert factory["onnx"].record.encodings == again["onnx"].record.encodings


def test_a_build_that_falls_short_says_why_and_has_no_artifacts(alone):
    import torch

    bundle = edgeship.build(
        small_network(), torch.zeros(1, 1, 4, 4), target="linux-x86", runtime="onnx", max_size="1kB", output="out"
    )
    assert not bundle.passed
    assert list(Path().iterdir()) == []
    assert any("check/size fell short on onnx" in reason for reason in bundle.reasons)
    assert "check/size fell short" in repr(bundle)
    assert "nothing was published" in bundle._repr_html_()
    for ask in (lambda: bundle.path, lambda: bundle["onnx"], lambda: list(bundle), bundle.verify, bundle.require):
        with pytest.raises(GateError, match=r"check/size fell short on onnx.*nothing was published"):
            ask()


def test_importing_loads_nothing():
    code = (
        "import sys, edgeship\n"
        "print([name for name in ('torch', 'numpy', 'click', 'rich', 'transformers') if name in sys.modules])\n"
        "print(set(edgeship.__all__) <= set(dir(edgeship)))\n"
        "edgeship.Quantize, edgeship.Bundle, edgeship.build, edgeship.load\n"
        "print([name for name in ('torch', 'onnx', 'transformers') if name in sys.modules])\n"
        "print([name for name in edgeship.__all__ if getattr(edgeship, name) is None])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines() == ["[]", "True", "[]", "[]"]
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        edgeship.biuld  # noqa: B018
