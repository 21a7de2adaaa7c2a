"""No command runs code that comes with a file or a folder, unless the user says ``--trust``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import PICKLES, PT2, changed_pt2, touched

TARGET = ("--target", "linux-x86", "--runtime", "onnx")
COMMANDS = {"build": ("build",), "plan": ("plan",), "dry run": ("build", "--dry-run")}
MODEL = """
import pathlib
import torch

pathlib.Path({canary!r}).touch()


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def data():
    return {{"x": torch.ones(2, 4).numpy()}}


def metric(outputs, labels):
    return 1.0
"""


def refused(ran, says: str, code: int = 3) -> None:
    assert ran.code == code, ran.err
    assert says in ran.errors[0]
    assert "Traceback" not in ran.err
    assert "a bug in edgeship" not in ran.err


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("name", ["pickled sample inputs", "an operator that is os.system", "a value's name"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_exported_program(cli, tmp_path, command, name, suffix):
    changed_pt2(tmp_path / f"m{suffix}", PT2[name], tmp_path / "canary")
    ran = cli(*COMMANDS[command], f"m{suffix}", *TARGET, "-o", "out")
    refused(ran, "add --trust")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PT2)
def test_every_hostile_program_is_refused_by_build(cli, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(tmp_path)
    changed_pt2(tmp_path / "m.pt2", PT2[name], tmp_path / "canary")
    refused(cli("build", "m.pt2", *TARGET, "-o", "out"), "m.pt2")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
@pytest.mark.parametrize("name", ["a saved pickle", "a name made on the stack"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_pickle_of_weights(cli, tmp_path, command, name, suffix):
    (tmp_path / "m.py").write_text("import torch\n\n\ndef model():\n    return torch.nn.Linear(4, 3)\n")
    PICKLES[name](tmp_path / f"w{suffix}", tmp_path / "canary")
    weights = (f"w{suffix}", "--factory", "m.py:model", "--input", "x:f32[1,4]")
    refused(cli(*COMMANDS[command], *weights, *TARGET, "-o", "out"), "more than tensors")
    # There is no --trust for pickles of weights: safetensors is the way out.
    refused(cli(*COMMANDS[command], *weights, *TARGET, "-o", "out", "--trust"), "more than tensors")
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def downloaded(tmp_path):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL.format(canary=str(tmp_path / "canary")))
    (folder / "config.json").write_text("{}")
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(torch.nn.Linear(4, 3).state_dict(), folder / "w.safetensors")
    np.savez(folder / "d.npz", x=np.ones((2, 4), np.float32))
    return folder


INPUTS = 'inputs = ["x:f32[1,4]"]\n'
SAMPLES = {
    "a factory": 'source = "model.py:model"\n' + INPUTS,
    "a factory by an odd path": 'source = "./../downloaded//model.py:model"\n' + INPUTS,
    "a factory of weights": 'source = "w.safetensors"\nfactory = "model.py:model"\n' + INPUTS,
    "a module": 'source = "model:model"\n' + INPUTS,
    "calibration": 'source = "."\ncalibration = "model.py:data"\n' + INPUTS,
    "evaluation": 'source = "."\nevaluation = "model.py:data"\n' + INPUTS,
    "a metric": 'source = "."\nevaluation = "d.npz"\nmetric = "model.py:metric"\n' + INPUTS,
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_names_python(cli, tmp_path, downloaded, command, name):
    (downloaded / "sample.toml").write_text(SAMPLES[name])
    refused(cli(*COMMANDS[command], "downloaded", *TARGET, "-o", "out"), "sample.toml names Python that would run: ")
    refused(cli(*COMMANDS[command], ".", *TARGET, "-o", "../out", cwd=downloaded), "names Python that would run: ")
    assert not (tmp_path / "canary").exists()


def test_trust_says_what_runs_and_lets_it(cli, tmp_path, downloaded):
    (downloaded / "sample.toml").write_text(SAMPLES["a factory"] + 'calibration = "model.py:data"\n')
    ran = cli("plan", "downloaded", *TARGET, "--trust")
    assert ran.code == 0, ran.err
    assert "--trust lets run: model.py:model" in ran.err
    assert "--trust lets run: model.py:data" in ran.err
    assert (tmp_path / "canary").exists()


def test_trust_lets_torch_load_a_program(cli, tmp_path):
    changed_pt2(tmp_path / "m.pt2", PT2["pickled sample inputs"], tmp_path / "canary")
    ran = cli("plan", "m.pt2", *TARGET, "--trust")
    assert "posix.system" in ran.err
    assert (tmp_path / "canary").exists()
    assert ran.code == 3
    (tmp_path / "canary").unlink()
    # What was trusted once is asked about again.
    refused(cli("plan", "m.pt2", *TARGET), "add --trust")
    assert not (tmp_path / "canary").exists()


def test_a_folder_without_python_needs_no_trust(cli, tmp_path, downloaded):
    (downloaded / "sample.toml").write_text('source = "w.safetensors"\ncalibration = "d.npz"\n' + INPUTS)
    mine = tmp_path / "mine.py"
    mine.write_text(MODEL.format(canary=str(tmp_path / "mine_ran")))
    ran = cli("plan", "downloaded", "--factory", "mine.py:model", *TARGET)
    assert ran.code == 0, ran.err
    assert (tmp_path / "mine_ran").exists()
    assert not (tmp_path / "canary").exists()


def test_weights_a_factory_and_normalised_images_in_one_sample(cli, tmp_path, downloaded):
    """What could not be said together: weights, the factory they belong to, and how images are normalised."""
    from PIL import Image

    (downloaded / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4), (index * 80, 90, 10)).save(downloaded / "images" / f"{index}.png")
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(torch.nn.Conv2d(3, 2, 3).state_dict(), downloaded / "w.safetensors")
    (downloaded / "model.py").write_text("import torch\n\n\ndef model():\n    return torch.nn.Conv2d(3, 2, 3)\n")
    (downloaded / "sample.toml").write_text(
        'source = "w.safetensors"\nfactory = "model.py:model"\ninputs = ["image:f32[1,3,4,4]"]\n'
        'calibration = "images"\n[input.image]\nmean = [0.5, 0.5, 0.5]\nstd = [0.2, 0.2, 0.2]\n'
    )
    ran = cli("build", "downloaded", *TARGET, "-o", "out", "--profile", "exact", "--trust")
    assert ran.code == 0, ran.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["artifacts"][0]["signature"]["inputs"][0]["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/hostname"])
def test_a_sample_that_leaves_its_folder(cli, tmp_path, downloaded, place):
    (tmp_path / "secret.safetensors").write_bytes((downloaded / "w.safetensors").read_bytes())
    (downloaded / "sample.toml").write_text(f'source = "{place}"\n' + INPUTS)
    refused(cli("plan", "downloaded", "--factory", "downloaded/model.py:model", *TARGET), "leads out of its folder")


def test_a_sample_of_itself(cli, downloaded):
    for source in ("./", "inner"):
        (downloaded / "inner").mkdir(exist_ok=True)
        (downloaded / "inner" / "sample.toml").write_text('source = ".."\n')
        (downloaded / "sample.toml").write_text(f'source = "{source}"\n')
        ran = cli("plan", "downloaded", *TARGET)
        assert ran.code in (2, 3)
        assert "a bug" not in ran.err


def test_a_sample_of_the_repository_needs_no_trust(cli, root):
    ran = cli("plan", root / "samples" / "digits_cnn", *TARGET)
    assert ran.code == 0, ran.err


def test_a_copy_of_a_sample_does(cli, root, tmp_path):
    import shutil

    shutil.copytree(root / "samples" / "digits_cnn", tmp_path / "samples" / "digits_cnn")
    (tmp_path / "pyproject.toml").write_text("")
    refused(cli("plan", "samples/digits_cnn", *TARGET), "names Python that would run: model.py:model")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hugging_face_folder_with_a_pickle(cli, tmp_path, command):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(touched(tmp_path / "canary"))
    ran = cli(*COMMANDS[command], "hf", *TARGET, "-o", "out")
    assert ran.code == 3, ran.err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("option", ["--eval", "--calibration"])
def test_data_with_a_pickle(cli, tmp_path, tiny_order, option):
    from hostile import Touch

    np.savez(tmp_path / "d.npz", image=np.array([Touch(tmp_path / "canary")] * 2))
    np.save(tmp_path / "d.npy", np.array([Touch(tmp_path / "canary")] * 2), allow_pickle=True)
    for name in ("d.npz", "d.npy"):
        for command in COMMANDS.values():
            ran = cli(*command, *tiny_order, option, name, "-o", "out")
            assert ran.code == 3, ran.err
    assert not (tmp_path / "canary").exists()


def _sealed(bundle: Path, change) -> None:
    import hashlib

    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["artifacts"][0])
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    (bundle / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


MANIFESTS = {
    "a runtime that is not here": lambda a: a.update(runtime="nothing"),
    "a kind that is not there": lambda a: a.update(model_kind="nothing"),
    "a huge input": lambda a: a["signature"]["inputs"][0].update(shape=[10**6, 10**6]),
    "a negative input": lambda a: a["signature"]["inputs"][0].update(shape=[-1, 4]),
    "a session option": lambda a: a.update(facts={"session.load_custom_library": "/tmp/evil.so"}),
    "a file outside": lambda a: a.update(main="../../etc/passwd"),
    "no number": lambda a: a.update(memory_bytes="many"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_bundle_that_says_something_else(cli, tmp_path, tiny_bundle, name):
    import shutil

    shutil.copytree(tiny_bundle, tmp_path / "b")
    _sealed(tmp_path / "b", MANIFESTS[name])
    for command in (("verify",), ("bench", "--seconds", "0.01"), ("chat", "--prompt", "a"), ("inspect",)):
        ran = cli(command[0], "b", *command[1:])
        assert ran.code in ((0, 8) if command[0] == "inspect" else (1, 2, 8)), (command, ran.err)
        assert "a bug in edgeship" not in ran.err
