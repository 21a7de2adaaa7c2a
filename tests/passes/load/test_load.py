"""Every loader on a small real model: the same answer as the model itself, and a change of any file it read is seen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context
from edgeship.core.profile import DataRef
from edgeship.engine.sources import find_source
from edgeship.errors import UnsafeSourceError, WeightsError
from edgeship.frontends.reads import recorded_reads
from edgeship.passes.load.export import LoadExport
from edgeship.passes.load.huggingface import LoadHuggingFace
from edgeship.passes.load.onnx import LoadOnnx
from edgeship.passes.load.torch import LoadFactory
from edgeship.passes.load.weights import LoadWeights, sets_in
from edgeship.program.compare import Reference
from edgeship.program.program import TorchProgram

NET = """
import torch
from torch import nn
def net():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
"""
X = np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "out").mkdir()
    return tmp_path


def network() -> torch.nn.Module:
    scope: dict = {}
    exec(NET, scope)
    return scope["net"]()


def loaded(task, reference: str, place: Path, **found) -> TorchProgram:
    model: TorchModel = task.run(find_source(reference, **found).source, Context(place / "out"))
    return TorchProgram.open(model)


def dependencies(place: Path) -> set[str]:
    return {Path(path).name for path in json.loads((place / "out" / "dependencies.json").read_text())}


def assert_answers(program: TorchProgram, inputs: dict[str, np.ndarray], wanted: torch.Tensor, output: str) -> None:
    np.testing.assert_allclose(Reference(program).run(inputs)[output], wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_factory(place):
    reference = f"{place / 'net.py'}:net"
    program = loaded(LoadFactory(reference, ("x:f32[1,4]",), ("y",), {"x": {"layout": "NC"}}), reference, place)
    assert_answers(program, {"x": X}, network()(torch.from_numpy(X)), "y")
    assert program.signature.inputs[0].layout == "NC"
    assert dependencies(place) - {Path(__file__).name} == {"net.py"}
    assert program.record.history == (f"load/torch: {reference}",)


def test_a_factory_notes_every_file_it_reads(place):
    from safetensors.torch import save_file

    save_file({"weight": torch.eye(4)}, place / "w.safetensors")
    np.save(place / "w.npy", np.ones(4))
    (place / "text.txt").write_text("1")
    (place / "other_part.py").write_text("SIZE = 4")
    (place / "reader.py").write_text(
        "from pathlib import Path\nimport numpy as np, torch\nfrom safetensors.torch import load_file\n"
        "from other_part import SIZE\nHERE = Path(__file__).parent\n"
        "def net():\n"
        "    layer = torch.nn.Linear(SIZE, 4, bias=False)\n"
        "    layer.load_state_dict(load_file(HERE / 'w.safetensors'))\n"
        "    np.load(HERE / 'w.npy'); open(HERE / 'text.txt').read()\n"
        "    open(HERE / 'written.txt', 'w').close()\n"
        "    return layer\n"
    )
    reference = f"{place / 'reader.py'}:net"
    loaded(LoadFactory(reference, ("x:f32[1,4]",)), reference, place)
    assert dependencies(place) - {Path(__file__).name} == {
        "reader.py",
        "other_part.py",
        "w.safetensors",
        "w.npy",
        "text.txt",
    }


def test_recording_ends_with_its_block(tmp_path):
    import safetensors

    before = safetensors.safe_open
    (tmp_path / "a").write_text("1")
    with recorded_reads() as reads:
        (tmp_path / "a").read_text()
    (tmp_path / "b").write_text("2")
    (tmp_path / "b").read_text()
    assert {path.name for path in reads.paths} == {"a"}
    assert safetensors.safe_open is before


def test_a_library_that_is_imported_while_recording_is_recorded_later_too(tmp_path, monkeypatch):
    import safetensors
    from safetensors.torch import save_file

    save_file({"w": torch.eye(2)}, tmp_path / "w.safetensors")
    (tmp_path / "takes_safe_open.py").write_text("from safetensors import safe_open\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with recorded_reads():
        import takes_safe_open
    assert takes_safe_open.safe_open is safetensors.safe_open
    with recorded_reads() as reads:
        takes_safe_open.safe_open(tmp_path / "w.safetensors", "pt")
    assert {path.name for path in reads.paths} == {"w.safetensors"}


def save_weights(place: Path, kind: str) -> Path:
    from safetensors.torch import save_file

    state = network().state_dict()
    if kind == "safetensors":
        save_file(state, place / "w.safetensors")
        return place / "w.safetensors"
    wrapped = {
        "plain": state,
        "state_dict": {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
        "model": {"model": state},
    }[kind]
    torch.save(wrapped, place / "w.th")
    return place / "w.th"


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "model"])
def test_weights_into_a_factory(place, kind):
    path = save_weights(place, kind)
    (place / "blank.py").write_text(NET.replace("manual_seed(4)", "manual_seed(5)"))
    factory = f"{place / 'blank.py'}:net"
    task = LoadWeights(DataRef(factory, ""), ("x:f32[1,4]",), ("y",))
    program = loaded(task, str(path), place, factory=factory)
    assert_answers(program, {"x": X}, network()(torch.from_numpy(X)), "y")
    assert "blank.py" in dependencies(place)


@pytest.mark.parametrize("depth", ["resnet20-12fca82f.th"])
def test_a_checkpoint_that_others_published(shared, depth):
    """Saved from DataParallel, with accuracy and epoch beside the weights."""
    path = shared / "data" / "models" / "resnet_cifar10" / depth
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    (weights,) = sets_in(path)
    assert weights.key == "state_dict"
    assert "module.conv1.weight" in weights.shapes
    shapes = [shape for name, shape in weights.shapes.items() if "running" not in name]
    assert sum(map(math.prod, shapes)) == pytest.approx(270e3, rel=0.02)


def test_a_pickle_of_more_than_tensors_is_refused_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"weight": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(UnsafeSourceError, match="save its state_dict as safetensors where you trust it"):
        sets_in(tmp_path / "w.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_no_weights_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "w.pt")
    assert sets_in(tmp_path / "w.pt") == []


def test_an_exported_program(place):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, *, shift):
            return {"y": self.inner(x), "z": (x + shift,)}

    program = torch.export.export(Net().eval(), (torch.ones(1, 4),), {"shift": torch.ones(1)})
    torch.export.save(program, place / "m.pt2")
    made = loaded(LoadExport(("y", "z")), str(place / "m.pt2"), place)
    assert [str(spec) for spec in made.signature.inputs] == ["x:f32[1,4]", "shift:f32[1]"]
    inputs = {"x": X, "shift": np.float32([2])}
    assert_answers(made, inputs, network()(torch.from_numpy(X)), "y")
    assert_answers(made, inputs, torch.from_numpy(X + 2), "z")


def onnx_file(place: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, place / "m.onnx", save_as_external_data=True, location="odd.name", size_threshold=0)
    return place / "m.onnx"


def test_an_onnx_file_with_a_size_for_its_dynamic_dimension(place):
    path = onnx_file(place)
    program = loaded(LoadOnnx(("x:f32[2,4]",)), str(path), place)
    x = np.concatenate([X, X + 1])
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32))
    assert_answers(program, {"x": x}, torch.tanh(torch.from_numpy(x) @ weight), "y")
    assert {"m.onnx", "odd.name"} <= dependencies(place)


def test_changed_external_data_is_seen_by_a_rebuild(place, cli):
    path = onnx_file(place)
    order = ("build", path, "--input", "x:f32[1,4]", "--target", "linux-x86", "--runtime", "onnx", "-o", "out")
    assert cli(*order).code == 0
    before = (place / "out" / "onnx" / "model.onnx").read_bytes()
    assert "= load/onnx" in cli(*order).err
    data = place / "odd.name"
    data.write_bytes((np.frombuffer(data.read_bytes(), np.float32) * 2).tobytes())
    ran = cli(*order)
    assert ran.code == 0, ran.err
    assert "+ load/onnx" in ran.err
    assert (place / "out" / "onnx" / "model.onnx").read_bytes() != before


def test_a_changed_file_behind_a_factory_is_seen_by_a_rebuild(place, cli):
    (place / "size.txt").write_text("2")
    (place / "reads.py").write_text(
        "import torch\nfrom pathlib import Path\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(4, int((Path(__file__).parent / 'size.txt').read_text()))\n"
    )
    order = ("plan", f"{place / 'reads.py'}:net", "--input", "x:f32[1,4]", "--target", "linux-x86", "--runtime", "onnx")
    assert "+ load/torch" in cli(*order).err
    assert "= load/torch" in cli(*order).err
    (place / "size.txt").write_text("3")
    assert "+ load/torch" in cli(*order).err


def hf_model(kind: str):
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    match kind:
        case "bert":
            return t.BertForSequenceClassification(t.BertConfig(vocab_size=60, max_position_embeddings=32, **small))
        case "vit":
            return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, num_labels=3, **small))
        case "whisper":
            config = t.WhisperConfig(
                vocab_size=60, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, max_source_positions=10,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )  # fmt: skip
            return t.models.whisper.modeling_whisper.WhisperEncoder(config)
    raise AssertionError(kind)


def load_hf(place: Path, task: LoadHuggingFace) -> TorchProgram:
    source = find_source(str(place / "hf")).source
    assert isinstance(source, Source)
    return TorchProgram.open(task.run(source, Context(place / "out")))


def test_a_text_model_from_a_folder(place):
    torch.manual_seed(0)
    model = hf_model("bert").eval()
    model.save_pretrained(place / "hf")
    program = load_hf(place, LoadHuggingFace())
    assert [str(spec) for spec in program.signature.inputs] == ["input_ids:i64[1,32]", "attention_mask:i64[1,32]"]
    assert program.signature.inputs[0].high == 59
    assert [spec.name for spec in program.signature.outputs] == ["logits"]
    ids = np.random.default_rng(0).integers(0, 60, (1, 32))
    mask = np.ones((1, 32), np.int64)
    mask[:, 20:] = 0
    wanted = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    assert_answers(program, {"input_ids": ids, "attention_mask": mask}, wanted, "logits")


def test_one_size_for_every_text_input(place):
    hf_model("bert").save_pretrained(place / "hf")
    program = load_hf(place, LoadHuggingFace(("input_ids:i64[1,8]",)))
    assert [spec.shape for spec in program.signature.inputs] == [(1, 8), (1, 8)]


def test_an_image_model_with_its_processor(place):
    torch.manual_seed(0)
    model = hf_model("vit").eval()
    model.save_pretrained(place / "hf")
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (place / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
    program = load_hf(place, LoadHuggingFace())
    (spec,) = program.signature.inputs
    assert (str(spec), spec.layout, spec.mean) == ("pixel_values:f32[1,3,16,16]", "NCHW", (0.5, 0.4, 0.3))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    assert_answers(program, {"pixel_values": pixels}, model(torch.from_numpy(pixels)).logits, "logits")


def test_an_audio_encoder_is_a_factory_of_its_own(place):
    """transformers exports no encoder class by name: a factory takes it, as the README shows."""
    torch.manual_seed(0)
    encoder = hf_model("whisper").eval()
    (place / "audio.py").write_text(
        "from transformers.models.whisper.modeling_whisper import WhisperEncoder\n"
        "def encoder():\n    return WhisperEncoder.from_pretrained('hf')\n"
    )
    encoder.save_pretrained(place / "hf")
    (place / "audio.py").write_text((place / "audio.py").read_text().replace("'hf'", repr(str(place / "hf"))))
    reference = f"{place / 'audio.py'}:encoder"
    program = loaded(LoadFactory(reference, ("input_features:f32[1,8,20]",)), reference, place)
    x = np.random.default_rng(0).standard_normal((1, 8, 20)).astype(np.float32)
    assert_answers(program, {"input_features": x}, encoder(torch.from_numpy(x)).last_hidden_state, "last_hidden_state")
    assert "model.safetensors" in dependencies(place)


def test_a_folder_that_lacks_a_weight_names_it(place):
    from safetensors.torch import load_file, save_file

    hf_model("bert").save_pretrained(place / "hf")
    path = place / "hf" / "model.safetensors"
    state = load_file(path)
    state.pop("classifier.bias")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks the weight classifier\.bias"):
        load_hf(place, LoadHuggingFace())
