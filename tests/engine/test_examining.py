"""Data that are nothing like the model's inputs are refused; doubts are said."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.core.model import Signature, TensorSpec, TorchModel
from edgeship.core.profile import DataRef
from edgeship.engine.examining import examine
from edgeship.errors import DataError
from edgeship.program.export import make_program
from edgeship.program.looks import look_at

SPEC = TensorSpec("image", "f32", (1, 3, 16, 16), "NCHW")
RNG = np.random.default_rng(0)
PIXELS = RNG.random((20, 3, 16, 16), np.float32)
NORMAL = (PIXELS - 0.45) / 0.22


def trained() -> nn.Module:
    """A network whose batch norms saw normalised images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    model.train()
    with torch.no_grad():
        for _ in range(50):
            model(torch.from_numpy(NORMAL))
    return model.eval()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = make_program(trained(), [SPEC], [torch.from_numpy(NORMAL[:1])])
    folder = tmp_path_factory.mktemp("program")
    program.save(folder / "p")
    return program, TorchModel(folder / "p", program.signature)


def data(folder, images) -> DataRef:
    np.savez(folder / "d.npz", image=images.astype(np.float32))
    return DataRef(str(folder / "d.npz"), "")


def test_images_as_in_training_are_taken(program, tmp_path):
    assert examine(data(tmp_path, NORMAL), program[1], program[0].signature) == ()
    look = look_at(program[0], [{"image": item[None]} for item in NORMAL])
    assert look.layer == "0.weight"
    assert look.spread == pytest.approx(1, abs=0.1)
    assert look.shift < 0.2


@pytest.mark.parametrize("wrong", [255 * PIXELS, NORMAL * 20, NORMAL * 0.001])
def test_images_of_another_size_are_refused(program, tmp_path, wrong):
    with pytest.raises(
        DataError, match=r"does not look like what the model was trained on: the first layer \(0.weight\)"
    ):
        examine(data(tmp_path, wrong), program[1], program[0].signature)


def test_images_that_were_not_normalised_are_doubted(program, tmp_path):
    (remark,) = examine(data(tmp_path, PIXELS), program[1], program[0].signature)
    assert "may be scaled in another way than in training" in remark


def test_what_the_user_says_of_the_range_is_believed(program, tmp_path):
    said = Signature((dataclasses.replace(SPEC, low=0.0, high=255.0),), program[0].signature.outputs)
    assert examine(data(tmp_path, 255 * PIXELS), program[1], said) == ()
    with pytest.raises(DataError, match=r"image holds 0.* to 2.*, the model takes 0 to 1; scale it"):
        examine(
            data(tmp_path, 255 * PIXELS), program[1], Signature((dataclasses.replace(SPEC, low=0.0, high=1.0),), ())
        )


def test_pixels_for_an_input_with_a_mean_are_refused(program, tmp_path):
    noted = Signature((dataclasses.replace(SPEC, mean=(0.45,), std=(0.22, 0.22, 0.22)),), ())
    with pytest.raises(DataError, match=r"the model takes -2.045 to 2.5"):
        examine(data(tmp_path, 255 * PIXELS), program[1], noted)
    assert examine(data(tmp_path, NORMAL), program[1], noted) == ()


def test_a_folder_of_images_without_a_mean_is_said(program, tmp_path):
    from PIL import Image

    for place in range(9):
        Image.fromarray((255 * PIXELS[place]).astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / f"{place}.png")
    remarks = examine(DataRef(str(tmp_path), ""), program[1], program[0].signature)
    assert "images are scaled to 0..1; no mean and std of image are known" in remarks[0]
    noted = Signature((dataclasses.replace(SPEC, mean=(0.45, 0.45, 0.45), std=(0.22, 0.22, 0.22)),), ())
    assert examine(DataRef(str(tmp_path), ""), program[1], noted) == ()


def test_norms_that_never_saw_data_say_nothing(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    assert make_program(model, [SPEC], [torch.randn(1, 3, 16, 16)]).record.expected == {}
