"""Bad input gets one clear line with the way out and its documented exit code; nothing is left at the output."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

TARGET = ("--target", "linux-x86", "--runtime", "onnx")
MODELS = """
import sys
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def constant():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(1, 3) + x.sum() * 0
    return Constant()

def with_nan():
    model = good()
    model[2].weight.data[0, 0] = float("nan")
    return model

def with_infinity():
    model = good()
    model[0].bias.data[0] = float("inf")
    return model

def too_large():
    model = good()
    model[0].weight.data[0, 0] = 1e8
    return model

def fails(): raise RuntimeError("no weights\\nhere")
def leaves(): sys.exit(3)
def nothing(): return None
def needs(size): return nn.Linear(size, size)

def branches():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1
    return Branches()

def unsupported():
    class Unsupported(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
        def forward(self, x):
            return self.inner(x)
    class Inner(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x.reshape(2, 2)) + 0 * x.sum()
    return Unsupported()

def remembers():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
        def forward(self, x):
            self.count += 1
            return x + self.count
    return Remembers()
"""
INPUT = ("--input", "x:f32[1,4]")


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "m.py").write_text(MODELS)
    return tmp_path


def onnx_model(place: Path, *, name: str = "m.onnx", op: str = "Relu", domain: str = "", sizes=(1, 4)) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node(op, ["h"], ["y"], name="blocks/3/odd", domain=domain),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [weight],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), place / name)
    return place / name


def external_onnx(place: Path, location: str) -> Path:
    import onnx
    from onnx.external_data_helper import set_external_data

    path = onnx_model(place)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    raw = tensor.raw_data
    set_external_data(tensor, location, 0, len(raw))
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    if ".." not in location and not location.startswith("/"):
        (place / location).write_bytes(raw)
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def checkpoint(place: Path, kind: str) -> Path:
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(place))
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).state_dict()
    sys.path.remove(str(place))
    if kind == "short":
        state.pop("2.bias")
    if kind == "stray":
        state["extra"] = torch.ones(2)
    if kind == "shape":
        state["2.weight"] = torch.ones(2, 8)
    if kind == "nan":
        state["0.weight"][1, 1] = float("nan")
    if kind.endswith(".pt"):
        torch.save(state, place / kind)
        return place / kind
    path = place / "w.safetensors"
    save_file(state, path)
    return path


class Bomb:
    """What a malicious pickle does when something unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def bomb(place: Path, name: str) -> Path:
    (place / name).write_bytes(pickle.dumps({"weight": Bomb(place / "exploded")}))
    return place / name


def zip_bomb(place: Path, name: str) -> Path:
    """As torch.save writes it."""
    import torch

    torch.save({"weight": Bomb(place / "exploded")}, place / name)
    return place / name


def hf_folder(place: Path, change: str = "") -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    folder = place / "hf"
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    match change:
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "truncated":
            cut(folder / "model.safetensors")
        case "shard":
            index = {"metadata": {}, "weight_map": {"classifier.bias": "model-00001-of-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            (folder / "model.safetensors").unlink()
        case "shard outside":
            index = {"metadata": {}, "weight_map": {"classifier.bias": "../secret.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "code":
            (folder / "odd.py").write_text(f"open({str(place / 'exploded')!r}, 'w')")
            data |= {"model_type": "odd", "auto_map": {"AutoModel": "odd.Odd", "AutoConfig": "odd.Odd"}}
        case "code, known type":
            (folder / "odd.py").write_text(f"open({str(place / 'exploded')!r}, 'w')")
            data |= {"architectures": ["Odd"], "auto_map": {"AutoModel": "odd.Odd"}}
        case "type":
            data["model_type"] = "bertt"
        case "architecture":
            data["architectures"] = ["BertForNothing"]
        case "not a model":
            data["architectures"] = ["BertTokenizer"]
        case "pickle":
            (folder / "model.safetensors").unlink()
            zip_bomb(folder, "pytorch_model.bin")
        case "sizes":
            data["hidden_size"] = 16
        case "words":
            data["hidden_size"] = "eight"
    (folder / "config.json").write_text("{" if change == "json" else json.dumps(data))
    if change == "list":
        (folder / "config.json").write_text("[]")
    return folder


def data_file(place: Path, **arrays) -> Path:
    np.savez(place / "data.npz", **arrays)
    return place / "data.npz"


def weights(path: Path, factory: str = "m.py:good", spec: tuple[str, ...] = INPUT) -> tuple[object, ...]:
    return (path, "--factory", factory, *spec)


good = ("m.py:good", *INPUT)
ones = np.ones((4, 4), np.float32)
Case = tuple[str, Callable[[Path], tuple[object, ...]], int, str]
CASES: list[Case] = [
    # sources that are not there, or damaged
    ("missing file", lambda p: ("gone.onnx",), 3, "gone.onnx does not exist"),
    ("empty onnx", lambda p: ((p / "m.onnx").write_bytes(b"") * 0 or p / "m.onnx",), 3, "m.onnx"),
    ("truncated onnx", lambda p: (cut(onnx_model(p)),), 3, "m.onnx"),
    ("text as onnx", lambda p: ((p / "m.onnx").write_text("hello") * 0 or p / "m.onnx",), 3, "m.onnx"),
    ("external data missing", lambda p: (external_onnx(p, "../w.bin").with_name("m.onnx"),), 3, "w.bin"),
    ("external data gone", lambda p: (gone(external_onnx(p, "w.bin"), p / "w.bin"),), 3, "w.bin"),
    ("external data truncated", lambda p: (cut_beside(external_onnx(p, "w.bin"), p / "w.bin"),), 3, '"w"'),
    ("external data by ..", lambda p: (external_onnx(p, "../../etc/passwd"),), 3, "outside"),
    ("external data absolute", lambda p: (external_onnx(p, "/etc/passwd"),), 3, "outside"),
    ("truncated safetensors", lambda p: weights(cut(checkpoint(p, ""))), 3, "not a readable safetensors file"),
    ("empty safetensors", lambda p: weights(cut(checkpoint(p, ""), 0)), 3, "not a readable safetensors file"),
    ("truncated checkpoint", lambda p: weights(cut(checkpoint(p, "w.pt"))), 3, "not a readable checkpoint"),
    ("truncated pt2", lambda p: (cut(exported(p)),), 3, "m.pt2 is not a readable .pt2"),
    ("text as pt2", lambda p: ((p / "m.pt2").write_text("hello") * 0 or p / "m.pt2",), 3, "not a readable .pt2"),
    ("pt2 with a dynamic size", lambda p: (exported(p, dynamic=True),), 3, "with the dynamic size"),
    ("a folder of nothing", lambda p: ((p / "e").mkdir() or p / "e",), 3, "is a folder without config.json"),
    ("an artifact",
     lambda p: ((p / "m.tflite").write_bytes(b"\x1c\0\0\0TFL3") * 0 or p / "m.tflite",), 3, "TFLite file"),
    # weights
    ("nan weights", lambda p: ("m.py:with_nan", *INPUT), 3, "weight 2.weight holds NaN"),
    ("infinite weights", lambda p: ("m.py:with_infinity", *INPUT), 3, "weight 0.bias holds NaN or infinity"),
    ("nan in safetensors", lambda p: weights(checkpoint(p, "nan")), 3, "weight 0.weight holds NaN"),
    ("a weight is missing", lambda p: weights(checkpoint(p, "short")), 3, "lacks the weight 2.bias"),
    ("a weight too many", lambda p: weights(checkpoint(p, "stray")), 3, "holds extra, which the model does not have"),
    ("a weight of another shape", lambda p: weights(checkpoint(p, "shape")), 3, "2.weight has shape (2, 8)"),
    ("weights without a factory", lambda p: (checkpoint(p, ""),), 3, "add --factory file.py:function"),
    ("weights without inputs", lambda p: weights(checkpoint(p, ""), spec=()), 2, "add --input"),
    ("weights too large for int8",
     lambda p: ("m.py:too_large", *INPUT), 3, "0.weight is too large for a float16 scale"),
    # code that must not run
    ("a key that is not there", lambda p: (*weights(checkpoint(p, "w.pt")), "--weights-key", "ema"), 3, "under 'ema'"),
    ("a key of safetensors", lambda p: (*weights(checkpoint(p, "")), "--weights-key", "ema"), 2, "in a checkpoint"),
    ("malicious pickle", lambda p: weights(bomb(p, "w.pth")), 3, "holds more than tensors"),
    ("malicious checkpoint", lambda p: weights(zip_bomb(p, "w.pt")), 3, "holds more than tensors"),
    ("malicious bin", lambda p: weights(bomb(p, "w.bin")), 3, "holds more than tensors"),
    ("malicious pt2", lambda p: (bomb(p, "m.pt2"),), 3, "not a readable .pt2"),
    ("malicious npz", lambda p: (*good, "--eval", data_file(p, x=np.array([Bomb(p / "exploded")] * 2))), 3, "data.npz"),
    ("malicious npy", lambda p: (*good, "--eval", object_npy(p)), 3, "not a NumPy file"),
    # factories
    ("factory raises", lambda p: ("m.py:fails", *INPUT), 3, "m.py:fails failed: RuntimeError: no weights here"),
    ("factory leaves", lambda p: ("m.py:leaves", *INPUT), 3, "m.py:leaves failed: SystemExit"),
    ("factory returns nothing", lambda p: ("m.py:nothing", *INPUT), 3, "returned NoneType; return an nn.Module"),
    ("factory wants arguments", lambda p: ("m.py:needs", *INPUT), 3, "m.py:needs failed: TypeError"),
    ("factory does not exist", lambda p: ("m.py:goood", *INPUT), 2, "did you mean m.py:good?"),
    ("module does not exist", lambda p: ("no.such.module:f", *INPUT), 2, "cannot be imported: ModuleNotFoundError"),
    ("file does not parse", lambda p: ((p / "s.py").write_text("def f(:") * 0 or "s.py:f", *INPUT), 2, "SyntaxError"),
    ("file leaves at import", lambda p: ((p / "s.py").write_text("exit(1)\ndef f(): ...") * 0 or "s.py:f", *INPUT), 2, "SystemExit"),
    ("weights, factory raises", lambda p: weights(checkpoint(p, ""), "m.py:fails"), 3, "failed: RuntimeError"),
    ("weights, factory gone", lambda p: weights(checkpoint(p, ""), "m.py:gone"), 2, "has no function gone"),
    ("weights, factory unnamed", lambda p: weights(checkpoint(p, ""), "m.py"), 2, "'m.py' names no function"),
    ("branches on values", lambda p: ("m.py:branches", *INPUT), 3, "the model asks for values that only a run tells"),
    ("changes its buffers", lambda p: ("m.py:remembers", *INPUT), 3, "changes its buffers while it runs: count"),
    ("says nothing", lambda p: ("m.py:constant", *INPUT), 1, "the reference says nothing"),
    # inputs
    ("no inputs", lambda p: ("m.py:good",), 2, "add --input name:f32[1,3,224,224]"),
    ("input without a shape", lambda p: ("m.py:good", "--input", "x"), 2, "is not name:dtype[sizes]"),
    ("input with a wrong dtype", lambda p: ("m.py:good", "--input", "x:float[1,4]"), 2, "no dtype float"),
    ("input with a dynamic size", lambda p: ("m.py:good", "--input", "x:f32[n,4]"), 2, "whole numbers above 0"),
    ("input with size 0", lambda p: ("m.py:good", "--input", "x:f32[0,4]"), 2, "whole numbers above 0"),
    ("input of a wrong shape", lambda p: ("m.py:good", "--input", "x:f32[1,5]"), 3, "does not run on x:f32[1,5]"),
    ("input of a wrong kind", lambda p: ("m.py:good", "--input", "x:i64[1,4]"), 3, "does not run on x:i64[1,4]"),
    ("two inputs of one name", lambda p: ("m.py:good", *INPUT, *INPUT), 2, "two inputs are called x"),
    ("too many output names", lambda p: (*good, "--output-name", "a", "--output-name", "b"), 2, "2 output names"),
    ("an output that is not there", lambda p: (*good, "--output-name", "logits=y"), 2, "no such output; it has output"),
    ("outputs in two forms", lambda p: (*good, "--output-name", "output=y", "--output-name", "z"), 2, "in one form"),
    ("a new name that is none", lambda p: (*good, "--output-name", "output=a b"), 2, "for example a_b"),
    ("onnx, too many names", lambda p: (onnx_model(p), *(["--output-name", "a"] * 2)), 2, "2 output names"),
    ("onnx without a size", lambda p: (onnx_model(p, sizes=("n", 4)),), 3, "x"),
    ("onnx input of a wrong name",
     lambda p: (onnx_model(p), "--input", "z:f32[1,4]"), 3, 'no input "z"; its inputs: "x"'),
    ("onnx input of a wrong dtype", lambda p: (onnx_model(p), "--input", "x:i64[1,4]"), 2, "is float32, not i64"),
    ("onnx input of a wrong shape", lambda p: (onnx_model(p), "--input", "x:f32[1,5]"), 3, "x"),
    # operators
    ("unsupported torch op", lambda p: ("m.py:unsupported", *INPUT), 4, "inner"),
    ("unsupported onnx op", lambda p: (onnx_model(p, op="Sparkle", domain="my.own"),), 4, "Sparkle"),
    # names
    ("no target", lambda p: (*good, NO_TARGET), 2, "no target; add --target"),
    ("unknown target", lambda p: (*good, "--target", "iphone15"), 2, "did you mean iphone15pro?"),
    ("unknown profile", lambda p: (*good, "--profile", "balancd"), 2, "did you mean balanced?"),
    ("unknown runtime", lambda p: (*good, "--runtime", "onx"), 2, "did you mean onnx?"),
    ("unknown option", lambda p: (*good, "--tarjet", "x"), 2, "--tarjet"),
    ("unknown pass", lambda p: (*good, "--set", "compress/quantise.bits=8"), 2, "did you mean compress/quantize?"),
    ("unknown field", lambda p: (*good, "--set", "compress/quantize.bit=8"), 2, "did you mean bits?"),
    ("--set without a value",
     lambda p: (*good, "--set", "compress/quantize.bits"), 2, "write compress/quantize.bits=8"),
    ("--set of a wrong type", lambda p: (*good, "--set", "compress/quantize.bits=x"), 2, "expected int"),
    ("--set of no encoding", lambda p: (*good, "--set", "compress/quantize.bits=7"), 5, "int7 is not an encoding"),
    ("--set of another route", lambda p: (*good, "--set", "check/size.runtime=foo"), 2, "change --runtime instead"),
    ("--set of no samples", lambda p: (*good, "--set", "check/verify.samples=0"), 2, "must be at least 16 for onnx"),
    ("--set without effect", lambda p: (*good, "--set", "compress/calibrate.bits=8"), 2, "has no effect"),
    ("a runtime no target runs", lambda p: (*good, "--runtime", "coreml"), 2, "linux-x86 does not run coreml"),
    ("--factory for a factory", lambda p: (*good, "--factory", "m.py:good"), 2, "leave it out"),
    ("--max-size of no size", lambda p: (*good, "--max-size", "large"), 2, "write 3GB"),
    ("--max-drop of no share", lambda p: (*good, "--max-drop", "200%"), 2, "write 1%"),
    *((f"{option} empty", lambda p, option=option: (*good, option, ""), 2, f"{option} is empty")
      for option in ("--runtime", "--max-size", "--max-drop", "--calibration", "--eval", "--metric")),
    ("--max-drop without data", lambda p: (*good, "--max-drop", "1%"), 2, "--max-drop needs data to measure on"),
    ("--metric without data", lambda p: (*good, "--metric", "accuracy"), 2, "add --eval DATA"),
    ("--max-size nothing fits", lambda p: (*good, "--max-size", "10b"), 1, "no profile fits; the smallest makes about"),
    # data
    ("data that is not there", lambda p: (*good, "--eval", "gone.npz"), 3, "gone.npz does not exist"),
    ("calibration not there", lambda p: (*good, "--calibration", "gone.npz"), 3, "gone.npz does not exist"),
    ("data of another shape", lambda p: (*good, "--eval", data_file(p, x=np.ones((4, 5), "f"))), 3, "shape (4, 5)"),
    ("calibration, same", lambda p: (*good, "--calibration", data_file(p, x=np.ones((4, 5), "f"))), 3, "shape (4, 5)"),
    ("data with nan", lambda p: (*good, "--eval", data_file(p, x=ones * np.nan)), 3, "x holds NaN or infinity"),
    ("data that is empty", lambda p: (*good, "--eval", data_file(p, x=ones[:0])), 3, "holds no samples"),
    ("data with stray names",
     lambda p: (*good, "--eval", data_file(p, x=ones, z=ones)), 3, "holds 'z', which is not an input"),
    ("data lacks an input", lambda p: (*good, "--eval", data_file(p, label=np.ones(4))), 3, "lacks the input x"),
    ("data of integers", lambda p: (*good, "--eval", data_file(p, x=ones.astype(int))), 3, "x is int64"),
    ("labels of another length",
     lambda p: (*good, "--eval", data_file(p, x=ones, label=np.ones(3))), 3, "different numbers"),
    ("text as data",
     lambda p: (*good, "--eval", (p / "t.npz").write_text("hi") * 0 or p / "t.npz"), 3, "not a NumPy file"),
    ("truncated data", lambda p: (*good, "--eval", cut(data_file(p, x=ones))), 3, "data.npz"),
    ("a folder without images", lambda p: (*good, "--eval", (p / "i").mkdir() or p / "i"), 3, "holds no images"),
    ("a data function that raises", lambda p: (*good, "--eval", "m.py:fails"), 3, "RuntimeError"),
    ("a data function of nothing", lambda p: (*good, "--eval", "m.py:nothing"), 3, "returned NoneType"),
    # Hugging Face folders
    ("hf without weights", lambda p: (hf_folder(p, "no weights"),), 3, "holds no model.safetensors"),
    ("hf truncated", lambda p: (hf_folder(p, "truncated"),), 3, "cannot be loaded"),
    ("hf shard missing", lambda p: (hf_folder(p, "shard"),), 3, "lacks model-00001-of-00002.safetensors"),
    ("hf shard outside", lambda p: (hf_folder(p, "shard outside"),), 3, "outside the folder"),
    ("hf with its own code", lambda p: (hf_folder(p, "code"),), 3, "brings its own model code"),
    ("hf with code for a known type", lambda p: (hf_folder(p, "code, known type"),), 3, "brings its own model code"),
    ("hf of an unknown type", lambda p: (hf_folder(p, "type"),), 3, "did you mean bert?"),
    ("hf of an unknown class", lambda p: (hf_folder(p, "architecture"),), 3, "no class BertForNothing"),
    ("hf that is no model", lambda p: (hf_folder(p, "not a model"),), 3, "BertTokenizer"),
    ("hf with a malicious pickle", lambda p: (hf_folder(p, "pickle"),), 3, "cannot be loaded"),
    ("hf config of other sizes", lambda p: (hf_folder(p, "sizes"),), 3, "hf"),
    ("hf config of words", lambda p: (hf_folder(p, "words"),), 3, "hf"),
    ("hf config not JSON", lambda p: (hf_folder(p, "json"),), 3, "config.json cannot be read"),
    ("hf config a list", lambda p: (hf_folder(p, "list"),), 3, "does not hold a JSON object"),
    ("hf unknown input", lambda p: (hf_folder(p), "--input", "pixels:i64[1,8]"), 2, "has no input pixels"),
    ("hf input of a wrong dtype", lambda p: (hf_folder(p), "--input", "input_ids:f32[1,8]"), 2, "is i64, not f32"),
    ("hf too many tokens", lambda p: (hf_folder(p), "--input", "input_ids:i64[1,64]"), 3, "input_ids:i64[1,64]"),
]  # fmt: skip
NO_TARGET = "--no-target-here"


def gone(path: Path, data: Path) -> Path:
    data.unlink()
    return path


def cut_beside(path: Path, data: Path) -> Path:
    cut(data)
    return path


def exported(place: Path, *, dynamic: bool = False) -> Path:
    import torch

    model = torch.nn.Linear(4, 3).eval()
    shapes = ({0: torch.export.Dim("rows", min=2, max=8)},) if dynamic else None
    program = torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes=shapes)
    torch.export.save(program, place / "m.pt2")
    return place / "m.pt2"


def object_npy(place: Path) -> Path:
    np.save(place / "x.npy", np.array([Bomb(place / "exploded")] * 2), allow_pickle=True)
    return place / "x.npy"


def assert_refused(ran, code: int, says: str) -> None:
    assert "Traceback" not in ran.out + ran.err
    assert ran.code == code, ran.err
    assert len(ran.errors) == 1, ran.err
    assert ran.err.rstrip().splitlines()[-1] == ran.errors[0], "the error is the last line"
    line = ran.errors[0]
    assert says in line
    assert len(line) < 700
    what, semicolon, way_out = line.partition("; ")
    assert semicolon, "no way out"
    assert len(way_out) > 3
    assert "a bug in edgeship" not in what


@pytest.mark.parametrize(("prepare", "code", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_line_with_the_way_out(cli, place, prepare, code, says):
    arguments = prepare(place)
    target = () if NO_TARGET in arguments else TARGET
    if "--runtime" in arguments:
        target = TARGET[:2]
    before = {path.name for path in place.iterdir()}
    ran = cli("build", *(item for item in arguments if item != NO_TARGET), *target, "-o", "out.edgeship")
    assert_refused(ran, code, says)
    assert {path.name for path in place.iterdir()} - before <= {"out.edgeship.log", "__pycache__"}
    assert not (place / "exploded").exists(), "code from the input was run"


def test_missing_inputs_are_told_before_anything_is_imported(cli_process, place):
    """torch takes seconds to import; the meta path refuses it here."""
    (place / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers', 'onnx'):\n"
        "            raise RuntimeError('imported ' + name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    weights_file = place / "w.safetensors"
    weights_file.write_bytes(b"0" * 16)
    for source in (("m.py:good",), (weights_file, "--factory", "m.py:good"), ("m.py:good", "--input", "x:f99[1]")):
        ran = cli_process("build", *source, *TARGET, "-o", "out", cwd=place, env={"PYTHONPATH": str(place)})
        assert_refused(ran, 2, "--input")
        assert "load/" not in ran.err


def test_names_may_have_spaces_around_them(cli, place):
    spaced = cli("plan", "m.py:good", *INPUT, "--target", "pixel8, iphone15pro", "--runtime", " onnx , tflite ")
    plain = cli("plan", "m.py:good", *INPUT, "--target", "pixel8,iphone15pro", "--runtime", "onnx,tflite")
    assert spaced.code == 0, spaced.err
    assert spaced.out == plain.out


def test_a_module_that_was_pickled_whole_is_said_to_be_one(cli, place):
    import torch

    torch.save(torch.nn.Linear(4, 2), place / "whole.pt")
    ran = cli("build", place / "whole.pt", *INPUT, *TARGET, "-o", "out")
    assert_refused(ran, 3, "is a pickled module, torch.nn.modules.linear.Linear: its code is not in the file")
    assert "add --factory file.py:function" in ran.err


def test_a_refused_pickle_says_what_is_in_it_and_advises_nothing_else(cli, place):
    import torch

    torch.save({"weight": Bomb(place / "exploded")}, place / "w.pt")
    ran = cli("build", place / "w.pt", "--factory", "m.py:good", *INPUT, *TARGET, "-o", "out")
    assert_refused(ran, 3, "holds more than tensors: ")
    assert "; loading it would run code" in ran.err
    assert "weights_only" not in ran.err
    assert "trust the source" not in ran.err


def test_an_unsupported_operator_is_named_with_its_place(cli, place):
    ran = cli("build", onnx_model(place, op="Sparkle", domain="my.own"), *TARGET, "-o", "out")
    assert "Sparkle" in ran.err
    assert "blocks/3/odd" in ran.err


def test_a_model_that_is_too_large_names_the_profile_that_fits(cli, place):
    (place / "large.py").write_text(
        "import torch\ndef model():\n    torch.manual_seed(0)\n    return torch.nn.Linear(512, 512)\n"
    )
    order = ("large.py:model", "--input", "x:f32[1,512]", *TARGET, "-o", "out")
    ran = cli("build", *order, "--profile", "exact", "--max-size", "400kB")
    assert_refused(ran, 1, "over --max-size 400 kB")
    assert "--profile" in ran.errors[0]
    profile = ran.errors[0].partition("--profile ")[2].split()[0]
    assert cli("build", *order, "--profile", profile, "--max-size", "400kB").code == 0
    assert not (place / "out.edgeship").exists()


def test_an_output_that_cannot_be_written(cli, place, tiny_bundle):
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "mine").write_text("mine")
    (place / "bundle").mkdir()
    for output, code, says in (
        ("file", 2, "is a file"),
        ("full", 2, "is not empty and not a bundle"),
        ("/", 2, "cannot be replaced"),
        ("/dev/null", 2, "is a file"),
        ("file/inner", 7, "cannot be written"),
        ("/proc/out", 7, "cannot be written"),
        ("x" * 300, 7, "cannot be written"),
    ):
        assert_refused(cli("build", *good, *TARGET, "-o", output), code, says)
    assert (place / "file").read_text() == "mine"
    assert (place / "full" / "mine").read_text() == "mine"
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("output", [".", "..", "../there", "a/b/c"])
def test_an_output_by_any_name(cli, place, output):
    inner = place / "here"
    inner.mkdir()
    order = (f"{place}/m.py:good", *INPUT, *TARGET, "-o", output)
    if output in (".", ".."):
        assert_refused(cli("build", *order, cwd=inner), 2, "holds the current folder")
        return
    ran = cli("build", *order, cwd=inner)
    assert ran.code == 0, ran.err
    assert cli("verify", inner / output, "--no-run").code == 0


def test_a_cache_that_cannot_be_written(cli, place):
    (place / "file").write_text("")
    ran = cli("build", *good, *TARGET, "-o", "out", env={"EDGESHIP_CACHE": str(place / "file")})
    assert_refused(ran, 7, "EDGESHIP_CACHE")


def test_a_bundle_that_is_none(cli, place, tiny_bundle):
    broken = place / "broken"
    shutil.copytree(tiny_bundle, broken)
    (broken / "manifest.json").write_text("{")
    for command in ("verify", "bench", "inspect"):
        assert_refused(cli(command, place / "gone"), 8, "gone")
        assert_refused(cli(command, broken), 8, "manifest.json is not valid JSON")
    for command in ("verify", "bench"):
        assert_refused(cli(command, place), 8, "holds no manifest.json; give the folder that edgeship build wrote")


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_no_time_to_measure(cli, tiny_bundle, seconds):
    assert_refused(cli("bench", tiny_bundle, "--seconds", seconds), 2, "no time to measure")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def wide_source(tmp_path) -> tuple[str, ...]:
    """A model whose files need some megabytes."""
    (tmp_path / "wide.py").write_text(
        "import torch\ndef model():\n    torch.manual_seed(0)\n    return torch.nn.Linear(1024, 1024)\n"
    )
    return (str(tmp_path / "wide.py") + ":model", "--input", "x:f32[1,1024]", "--profile", "exact")


def test_a_full_disk_under_the_output(cli, small_disk, wide_source):
    ran = cli("build", *wide_source, *TARGET, "-o", small_disk / "out.edgeship")
    assert_refused(ran, 7, "no space left on the disk of")
    assert str(small_disk) in ran.errors[0]
    assert [path.name for path in small_disk.iterdir()] == ["out.edgeship.log"]


def test_a_full_disk_under_the_output_keeps_the_bundle_that_was_there(cli, small_disk, wide_source, tiny_order):
    output = small_disk / "out.edgeship"
    assert cli("build", *tiny_order, "-o", output).code == 0
    assert_refused(cli("build", *wide_source, *TARGET, "-o", output), 7, "no space left")
    assert cli("verify", output, "--no-run").code == 0


def test_a_full_disk_under_the_cache(cli, small_disk, wide_source, place):
    env = {"EDGESHIP_CACHE": str(small_disk)}
    ran = cli("build", *wide_source, *TARGET, "-o", "out.edgeship", env=env)
    assert_refused(ran, 7, "no space left on the disk of")
    assert not (place / "out.edgeship").exists()
    assert list((small_disk / "running").iterdir()) == []


def test_a_runtime_that_is_not_installed(place):
    """The distribution is hidden in a process of its own."""
    (place / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'onnxruntime': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
    )
    command = [sys.executable, "-m", "edgeship.cli.main"]
    environment = {**os.environ, "PYTHONPATH": str(place)}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)], cwd=place, env=environment, capture_output=True, text=True, check=False
        )

    done = run("build", *good, *TARGET, "-o", "out.edgeship")
    assert done.returncode == 6
    assert done.stderr == 'error: ONNX Runtime needs onnxruntime; pip install "edgeship[onnx]"\n'
    listed = json.loads(run("runtimes", "--json").stdout)
    assert {row["name"]: row["ok"] for row in listed}["onnx"] is False
    assert {row["name"]: row["ok"] for row in listed}["coreai"] is True


def test_a_real_process_ends_with_the_same_line(cli_process, place):
    ran = cli_process("build", "m.py:with_nan", *INPUT, *TARGET, "-o", "out.edgeship")
    assert_refused(ran, 3, "weight 2.weight holds NaN")
