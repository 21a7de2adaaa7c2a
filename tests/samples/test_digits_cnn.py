"""The committed digits network is as accurate as its README says, and is described as it is."""

import importlib.util
import tomllib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[2] / "samples" / "digits_cnn"


def load_model() -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("digits_model", FOLDER / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model()


def test_accuracy_on_images_the_training_never_saw():
    data = np.load(FOLDER / "eval.npz")
    with torch.no_grad():
        answers = load_model()(torch.from_numpy(data["image"])).argmax(1).numpy()
    assert len(data["label"]) == 540
    right = int((answers == data["label"]).sum())
    assert right / 540 >= 0.98
    assert f"({right} of 540)" in " ".join((FOLDER / "README.md").read_text().split())


def test_evaluation_and_calibration_images_are_not_the_same():
    test, calibration = (np.load(FOLDER / name)["image"] for name in ("eval.npz", "calibration.npz"))
    assert calibration.shape == (128, 1, 8, 8)
    seen = {image.tobytes() for image in calibration}
    assert not any(image.tobytes() in seen for image in test)


def test_sample_file_describes_the_data():
    sample = tomllib.loads((FOLDER / "sample.toml").read_text())
    notes = sample["input"]["image"]
    images = np.load(FOLDER / sample["evaluation"])["image"]
    ends = [(pixel - notes["mean"][0]) / notes["std"][0] for pixel in (0, 1)]
    assert np.allclose([notes["low"], notes["high"]], ends, atol=1e-4)
    assert np.allclose([images.min(), images.max()], ends, atol=1e-4)
    # 17 grey values, as in the original
    assert len(np.unique(images)) == 17


def test_the_network_has_every_kind_of_layer_it_promises():
    kinds = {type(layer) for layer in load_model().modules()}
    assert {
        torch.nn.Conv2d,
        torch.nn.BatchNorm2d,
        torch.nn.MaxPool2d,
        torch.nn.AdaptiveAvgPool2d,
        torch.nn.Linear,
    } <= kinds
    assert any(isinstance(layer, torch.nn.Conv2d) and layer.groups > 1 for layer in load_model().modules())
