"""Models in memory of every kind become bundles; what is none of them gets one clear line."""

import re
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

import edgeship
from edgeship.api.sessions import Network
from edgeship.core.model import Signature
from edgeship.errors import EdgeshipError

HERE = {"target": "linux-x86", "runtime": "onnx", "weights": "float16"}


class Named(nn.Module):
    """An image in, two answers out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, image):
        answer = self.layer(image)
        return answer, answer.argmax(-1)


def test_an_exported_program_keeps_its_own_inputs(tmp_path):
    model = Named().eval()
    exported = torch.export.export(model, (torch.zeros(1, 4),))
    bundle = edgeship.build(exported, output_names=["scores", "best"], output=tmp_path / "out", **HERE)
    with bundle["onnx"].open() as network:
        image = torch.randn(1, 4)
        found = network(image)
        assert list(found) == ["scores", "best"]
        np.testing.assert_allclose(found["scores"], model(image)[0].detach(), atol=2e-3)
        assert network(image=image[0].numpy())["best"].tolist() == model(image)[1].tolist()


@pytest.mark.heavy
def test_data_in_memory_are_calibrated_on_and_measured(tmp_path):
    """The same data from a file give the same artifact."""
    torch.manual_seed(0)
    images, labels = torch.randn(40, 4), torch.arange(40) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    said = {"target": "linux-x86", "runtime": "onnx", "max_drop": 1.0, "passes": [edgeship.Quantize(bits=4)]}
    first = edgeship.build(
        Named(), {"image": images[:1]}, calibration=loader, eval=loader, output=tmp_path / "a", **said
    )
    np.savez(tmp_path / "d.npz", image=images.numpy(), label=labels.numpy())
    second = edgeship.build(
        Named(), {"image": images[:1]}, calibration=tmp_path / "d.npz", eval=tmp_path / "d.npz",
        output=tmp_path / "b", **said,
    )  # fmt: skip
    assert first["onnx"].record.files == second["onnx"].record.files
    assert first["onnx"].row.figure("accuracy").value == second["onnx"].row.figure("accuracy").value
    assert first["onnx"].row.figure("accuracy").runs == second["onnx"].row.figure("accuracy").runs > 0
    assert {item.bits for item in first["onnx"].record.encodings.values()} == {4}


@pytest.mark.heavy
def test_a_model_of_transformers_is_what_its_folder_is(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.int64), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    bundle = edgeship.build(model, inputs, output=tmp_path / "a", **HERE)
    assert model.training
    model.save_pretrained(tmp_path / "folder")
    folder = edgeship.build(tmp_path / "folder", inputs, output=tmp_path / "b", **HERE)
    assert bundle["onnx"].record.files == folder["onnx"].record.files
    assert bundle.report.source == "BertForSequenceClassification"
    with bundle["onnx"].open() as network:
        scores = network(**inputs)
    np.testing.assert_allclose(scores, model.eval()(**inputs).logits.detach(), atol=5e-3)


@pytest.mark.heavy
def test_a_language_model_and_its_tokenizer_write_as_their_folder_does(family, tmp_path):
    import transformers

    folder = family("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = {
        "target": "linux-x86", "runtime": "genai", "context": 64, "weights": "float16",
        "passes": [edgeship.Verify(min_total_db=-200)], "calibration": ["the king of this land said nothing"] * 60,
    }  # fmt: skip
    bundle = edgeship.build(model, tokenizer=tokenizer, output=tmp_path / "a", **said)
    again = edgeship.build(folder, output=tmp_path / "b", **said)
    assert bundle["onnx"].runtime == "genai"
    texts = []
    for made in (bundle, again):
        with made["genai"].open() as language:
            texts.append(language.generate("the king", 8))
            assert "".join(language.stream("the king", 8)) == texts[-1]
            first = language.chat("the king", 8)
            language.reset()
            assert language.chat("the king", 8) == first
            with pytest.raises(EdgeshipError, match="writes nothing"):
                language.generate("the king", 0)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("model", "inputs", "said", "says"),
    [
        (Named(), None, {}, 'Named does not say what its inputs are; give inputs=example, or inputs="image'),
        (Named(), torch.zeros(1, 4), {"tokenizer": object()}, "tokenizer belongs to a language model of transformers"),
        (Named(), torch.zeros(1, 4), {"factory": "m.py:f"}, "--factory belongs to a weights file"),
        (Named(), torch.zeros(1, 4), {"context": 64}, "--context is for language models"),
        (Named(), torch.zeros(1, 4), {"output_names": ["a b", "c"]}, "--output-name 'a b' is not a name that every runtime accepts"),
        (Named(), torch.zeros(1, 4), {"output_names": ["a"]}, "1 output name for 2 outputs"),
        (Named(), torch.zeros(1, 4), {"input_names": {"picture": "x"}}, "the model has no input picture; it has"),
        (Named(), torch.zeros(1, 5), {}, "the model does not run on image:f32[1,5]"),
        (nn.Identity(), torch.zeros(1, 4), {"target": "pixel"}, 'no target "pixel"; did you mean'),
        (Named, torch.zeros(1, 4), {}, "Named is a class, not a model; give one of it: Named(...)"),
        (Named().state_dict(), None, {}, "OrderedDict is not a model"),
    ],
)  # fmt: skip
def test_bad_models_and_inputs_get_one_line(model, inputs, said, says, tmp_path):
    with pytest.raises(EdgeshipError) as raised:
        edgeship.build(model, inputs, output=tmp_path / "out", **{**HERE, **said})
    assert says in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_exported_programs_that_cannot_be_built_say_why(tmp_path):
    dynamic = torch.export.export(
        Named(), (torch.zeros(2, 4),), dynamic_shapes={"image": {0: torch.export.Dim("n", min=1, max=8)}}
    )
    for model, inputs, says in (
        (dynamic, None, "ExportedProgram was exported with the dynamic size"),
        (
            torch.export.export(Named(), (torch.zeros(1, 4),)),
            torch.zeros(1, 4),
            "--input is for models whose sizes are",
        ),
        (
            torch.export.export(torch.nn.BatchNorm1d(4).train(), (torch.zeros(2, 4),)),
            None,
            "a batch norm is in training mode; call model.eval() before torch.export.export",
        ),
    ):
        with pytest.raises(EdgeshipError, match=re.escape(says)):
            edgeship.plan(model, inputs, **HERE)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    class Masked(nn.Module):
        def forward(self, image, ids):
            return image * ids.sum()

    inputs = {"image": torch.rand(1, 2, 3), "ids": torch.ones(1, 4, dtype=torch.int32)}
    bundle = edgeship.build(Masked(), inputs, output=tmp_path_factory.mktemp("masked") / "out", **HERE)
    with bundle["onnx"].open() as found:
        yield found


IMAGE, IDS = np.ones((1, 2, 3), "f"), np.ones((1, 4), "i")


def test_a_closed_network_says_so():
    closed = Network(None, Signature((), ()), "onnx/model", ExitStack())
    closed.close()
    with pytest.raises(EdgeshipError, match="onnx/model is closed; open it again"):
        closed()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((IMAGE, IDS), {}),
        ((IMAGE,), {"ids": IDS}),
        ((), {"ids": IDS, "image": IMAGE}),
        (({"ids": IDS, "image": IMAGE},), {}),
        ((IMAGE[0], IDS[0]), {}),
        ((torch.from_numpy(IMAGE).requires_grad_(), torch.from_numpy(IDS).long()), {}),
        ((IMAGE.tolist(), IDS.tolist()), {}),
        ((IMAGE.astype(float), IDS.astype(np.uint8)), {}),
    ],
)
def test_a_network_is_called_as_python_calls(network, args, named):
    np.testing.assert_allclose(network(*args, **named), IMAGE * 4)
    assert list(network.run({"image": IMAGE, "ids": IDS})) == ["output"]


@pytest.mark.parametrize(
    ("args", "named", "says"),
    [
        ((IMAGE,), {}, "onnx/model.onnx lacks the input ids; it takes image:f32[1,2,3], ids:i32[1,4]"),
        ((IMAGE, IDS, IDS), {}, "onnx/model.onnx takes 2 inputs, not 3; give image, ids"),
        ((IMAGE, IDS), {"ids": IDS}, "the input ids is given twice"),
        ((), {"image": IMAGE, "idz": IDS}, "onnx/model.onnx has no input idz; did you mean ids?"),
        ((np.ones((2, 2, 3)), IDS), {}, "image has shape (2, 2, 3), onnx/model.onnx takes image:f32[1,2,3]; call it once"),
        ((IMAGE, IDS + 0.5), {}, "ids is float64, onnx/model.onnx takes ids:i32[1,4]"),
        ((IMAGE, IDS.astype("q") + 2**40), {}, "ids: values do not fit int32"),
        ((IMAGE, "text"), {}, "ids is of type str, which holds no numbers"),
    ],
)  # fmt: skip
def test_a_bad_call_gets_one_line(network, args, named, says):
    with pytest.raises(EdgeshipError) as raised:
        network(*args, **named)
    assert says in str(raised.value)
