"""What the user names is told apart by what it is; nothing is loaded or run to find out."""

import zipfile
from pathlib import Path

import pytest

from edgeship.engine.sources import find_source
from edgeship.errors import SourceError, UsageError


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text("raise SystemExit('never imported')")
    return tmp_path


def zipped(path: Path, name: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "pt2")
    return path


def test_a_factory_in_a_file(place):
    found = find_source("model.py:model", inputs=("x:f32[1]",))
    assert (found.source.form, found.source.reference) == ("torch", "model.py:model")
    assert found.load["inputs"] == ("x:f32[1]",)


def test_a_factory_in_a_package(place):
    assert find_source("package.module:function").source.form == "torch"


def test_a_hugging_face_folder(place):
    (place / "hf").mkdir()
    (place / "hf" / "config.json").write_text("{}")
    assert find_source("hf").source.form == "huggingface"


@pytest.mark.parametrize("name", ["m.onnx", "M.ONNX"])
def test_an_onnx_file(place, name):
    (place / name).write_bytes(b"\x08\x01")
    assert find_source(name).source.form == "onnx"


def test_an_exported_program(place):
    zipped(place / "m.pt2", "archive/archive_format")
    assert find_source("m.pt2").source.form == "export"


def test_an_exported_program_under_another_name(place):
    zipped(place / "m.pt", "archive/archive_format")
    assert find_source("m.pt").source.form == "export"


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.th", "w.bin", "w.ckpt"])
def test_a_pickle_of_weights(place, name):
    zipped(place / name, "archive/data.pkl")
    assert find_source(name, factory="model.py:model").source.form == "pickle"
    (place / name).write_bytes(b"\x80\x02")
    assert find_source(name, factory="model.py:model").source.form == "pickle"


def test_weights_in_safetensors(place):
    (place / "w.safetensors").write_bytes(b"")
    assert find_source("w.safetensors", factory="model.py:model").source.form == "safetensors"


def test_a_sample_brings_its_inputs_and_data(root):
    found = find_source(str(root / "samples" / "digits_cnn"))
    assert found.source.form == "torch"
    assert found.source.reference.endswith("samples/digits_cnn/model.py:model")
    assert found.load["inputs"] == ("image:f32[1,1,8,8]",)
    assert found.load["outputs"] == ("logits",)
    assert found.load["notes"]["image"]["mean"] == (0.305,)
    assert Path(found.calibration).is_file()
    assert Path(found.evaluation).is_file()


def test_what_the_user_says_goes_before_what_the_sample_says(root):
    found = find_source(str(root / "samples" / "digits_cnn"), inputs=("x:f32[2]",), outputs=("y",))
    assert (found.load["inputs"], found.load["outputs"]) == (("x:f32[2]",), ("y",))


def test_a_sample_may_be_its_own_hugging_face_folder(place):
    (place / "s").mkdir()
    (place / "s" / "sample.toml").write_text('source = "."\nevaluation = "e.npz"')
    (place / "s" / "config.json").write_text("{}")
    found = find_source("s")
    assert found.source.form == "huggingface"
    assert found.evaluation == str(Path("s/e.npz"))


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("gone.onnx", "gone.onnx does not exist"),
        ("modle.py:model", "modle.py does not exist; did you mean model.py?"),
        ("no/such/folder/m.onnx", "no/such/folder does not exist either"),
        ("model.py", "is a Python file; name the function that returns the model: model.py:model"),
        ("empty", "is a folder without config.json or sample.toml"),
        ("x.tflite", "is a TFLite file, which is an output of edgeship"),
        ("x.txt", "the format of x.txt is not known; give file.py:function"),
        ("w.safetensors", "weights without a model; add --factory"),
        ("w.pth", "weights without a model; add --factory"),
        ("a" * 5000, "cannot be read: File name too long"),
        ("", "does not exist"),
    ],
)
def test_what_cannot_be_a_source_says_what_can(place, reference, says):
    (place / "empty").mkdir()
    (place / "x.tflite").write_bytes(b"\x1c\0\0\0TFL3")
    (place / "x.txt").write_text("text")
    (place / "w.safetensors").write_bytes(b"")
    (place / "w.pth").write_bytes(b"\x80\x02")
    with pytest.raises(SourceError) as raised:
        find_source(reference)
    assert says in str(raised.value)


@pytest.mark.parametrize("reference", ["m.onnx", "model.py:model", "hf"])
def test_a_factory_that_nobody_needs_is_refused(place, reference):
    (place / "m.onnx").write_bytes(b"\x08\x01")
    (place / "hf").mkdir()
    (place / "hf" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="--factory belongs to a weights file"):
        find_source(reference, factory="model.py:model")


def test_a_special_file_is_no_source(place):
    import os

    os.mkfifo(place / "pipe.onnx")
    with pytest.raises(SourceError, match="is neither a file nor a folder"):
        find_source("pipe.onnx")


@pytest.mark.parametrize(
    ("text", "says"),
    [("source = ", "sample.toml"),
     ('input = "x"', "sample.toml"), ('source = "m.py:f"\nmodel = 1', "unknown key 'model'"),
     ('source = "gone.py:f"', "gone.py does not exist")],
)  # fmt: skip
def test_a_sample_file_with_mistakes_is_named(place, text, says):
    (place / "s").mkdir()
    (place / "s" / "sample.toml").write_text(text)
    with pytest.raises((UsageError, SourceError)) as raised:
        find_source("s")
    assert says in str(raised.value)


def test_the_digest_changes_with_every_file_that_counts(place):
    (place / "m.onnx").write_bytes(b"\x08\x01")
    before = find_source("m.onnx").source.digest
    assert find_source("m.onnx").source.digest == before
    (place / "m.onnx.data").write_bytes(b"1")
    beside = find_source("m.onnx").source.digest
    (place / "m.onnx.data").write_bytes(b"2")
    assert len({before, beside, find_source("m.onnx").source.digest}) == 3
    hf = place / "hf"
    (hf / "inner").mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    (hf / "inner" / "weights").write_text("1")
    first = find_source("hf").source.digest
    (hf / "inner" / "weights").rename(hf / "weights")
    assert find_source("hf").source.digest != first


@pytest.mark.parametrize("reference", ["same.py:model", "inner.same:model"])
def test_a_factory_in_another_folder_is_another_source(place, monkeypatch, reference):
    # Its code may be equal, but not what it imports or reads beside itself.
    digests = []
    for name in ("one", "two"):
        (place / name).mkdir()
        (place / name / "same.py").write_text("from beside import model\n")
        monkeypatch.chdir(place / name)
        monkeypatch.setattr("sys.path", [""])
        digests.append(find_source(reference).source.digest)
    assert len(set(digests)) == 2


def test_the_factory_of_weights_counts_in_their_digest(place):
    (place / "w.safetensors").write_bytes(b"1")
    for name in ("one", "two"):
        (place / name).mkdir()
        (place / name / "same.py").write_text("from beside import model\n")
    one, two = (find_source("w.safetensors", factory=f"{name}/same.py:model").source.digest for name in ("one", "two"))
    assert one != two
