"""compress/smooth leaves the float model as it is; compress/finetune makes few bits hurt less."""

import numpy as np
import pytest
import torch

from edgeship.core.passes import Context, Skip
from edgeship.errors import DataError, UsageError
from edgeship.passes.compress.finetune import FinetuneWeights
from edgeship.passes.compress.quantize import QuantizeWeights
from edgeship.passes.compress.smooth import SmoothScales
from edgeship.program.program import TorchProgram


def outputs(model, images):
    module = TorchProgram.open(model).module()
    return torch.stack([module(x)[0] for x in images])


@pytest.fixture(scope="module")
def images(calibration):
    return torch.from_numpy(np.load(calibration.reference)["image"][:, None])


def test_both_are_planned_only_when_asked_for(request_for, calibration):
    assert isinstance(SmoothScales.plan(request_for()), Skip)
    assert isinstance(FinetuneWeights.plan(request_for()), Skip)
    options = {"compress/quantize": {"method": "awq", "bits": 4, "granularity": "group", "group_size": 64}}
    planned = SmoothScales.plan(request_for(options=options, calibration=calibration))
    assert (planned.method, planned.weights) == ("awq", "int4-g64")
    static = SmoothScales.plan(request_for("qnn", options={"compress/smooth": {}}, calibration=calibration))
    assert static.method == "smoothquant"


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_smoothing_changes_weights_and_not_the_answers(method, saved, calibration, images, tmp_path):
    made = SmoothScales(method, weights="int4-g16", data=calibration, samples=16).run(saved, Context(tmp_path))
    before, after = TorchProgram.open(saved), TorchProgram.open(made)
    assert not torch.equal(before.weights["6.weight"], after.weights["6.weight"])
    difference = outputs(made, images) - outputs(saved, images)
    assert float(difference.square().sum() / outputs(saved, images).square().sum()) < 1e-9
    assert after.record.history[-1].startswith(f"compress/smooth: {method}")


def test_training_for_two_bits_loses_less_than_rounding(saved, calibration, images, tmp_path):
    step = FinetuneWeights(steps=40, lr=1e-3, batch=4, weights="int2", clip=True, data=calibration)
    trained = step.run(saved, Context(tmp_path))
    wanted = outputs(saved, images)
    noise = []
    for number, model in enumerate((saved, trained)):
        folder = tmp_path / str(number)
        folder.mkdir()
        quantized = QuantizeWeights(bits=2, method="clipped").run(model, Context(folder))
        noise.append(float((outputs(quantized, images) - wanted).square().sum()))
    assert noise[1] < 0.7 * noise[0]


def test_a_users_loss_gets_the_labels(saved, calibration, tmp_path):
    script, marker = tmp_path / "loss.py", tmp_path / "labels.txt"
    script.write_text(
        "import torch\n\n\ndef loss(module, batch):\n"
        f"    open({str(marker)!r}, 'a').write(f\"{{int(batch['label'])}}\\n\")\n"
        "    return torch.nn.functional.cross_entropy(module(batch['image'])[0], batch['label'].reshape(1).long())\n"
    )
    step = FinetuneWeights(steps=3, batch=2, weights="int4", data=calibration, loss=f"{script}:loss")
    program = TorchProgram.open(step.run(saved, Context(tmp_path)))
    assert program.record.history[-1].endswith("loss.py:loss")
    given = set(np.load(calibration.reference)["label"].tolist())
    asked = [int(line) for line in marker.read_text().split()]
    assert len(asked) == 3 * 2
    assert set(asked) <= given
    assert len(set(asked)) > 1


@pytest.mark.parametrize(
    ("step", "error", "says"),
    [
        (SmoothScales(), DataError, "awq needs calibration data"),
        (FinetuneWeights(), DataError, "training needs data"),
    ],
)
def test_without_data_there_is_nothing_to_learn_from(step, error, says, request_for):
    with pytest.raises(error, match=says):
        step.confirm(request_for())


def test_bad_options_are_refused(request_for, calibration):
    with pytest.raises(UsageError, match="alpha=2 is not a share"):
        SmoothScales(alpha=2.0, data=calibration).confirm(request_for())
    with pytest.raises(UsageError, match="integer weights, not palette4"):
        SmoothScales(weights="palette4", data=calibration).confirm(request_for())
    with pytest.raises(UsageError, match="above zero"):
        FinetuneWeights(steps=0, data=calibration).confirm(request_for())
    with pytest.raises(UsageError, match="names no function"):
        FinetuneWeights(loss="train.py", data=calibration).confirm(request_for())
    with pytest.raises(UsageError, match="does not exist"):
        FinetuneWeights(loss="nofile.py:loss", data=calibration).confirm(request_for())


def test_training_rounds_as_what_follows_it(request_for, calibration):
    options = {"compress/finetune": {"steps": 1}}
    for profile in ("balanced", "small", "auto"):
        request = request_for(profile=profile, calibration=calibration, options=options)
        assert FinetuneWeights.plan(request).clip == (QuantizeWeights.plan(request).method == "clipped")
