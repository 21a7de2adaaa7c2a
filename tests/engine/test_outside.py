"""What a step reads outside the cache is what was named, or nothing is kept of it and the build starts again."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeship.core.model import Signature, TorchModel
from edgeship.core.passes import Context, Pass
from edgeship.core.plan import Plan, Step
from edgeship.core.profile import AdapterRef, DataRef
from edgeship.data.batches import describe_data
from edgeship.engine import outside, sources
from edgeship.engine.cache import Cache
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Silence, execute
from edgeship.engine.outside import Outside
from edgeship.errors import ChangedError
from edgeship.frontends import reads
from edgeship.frontends.lora import adapter_digest
from edgeship.passes.load import weights as loader
from edgeship.program.stored import Place, WeightStore, outside_files, save_floats

ONE, TWO = b"model one", b"model two"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Read(Pass):
    """Reads the source; ``meddle`` is called in the middle."""

    name: ClassVar[str] = "load/read"
    meddle: ClassVar[Change] = staticmethod(lambda path: None)

    @classmethod
    def plan(cls, request): ...

    def run(self, model: sources.Source, ctx: Context) -> TorchModel:
        content = model.path.read_bytes()
        type(self).meddle(model.path)
        (ctx.folder / "program").mkdir()
        (ctx.folder / "program" / "content").write_bytes(content + model.path.read_bytes())
        return TorchModel(ctx.folder / "program", Signature((), ()))


def in_place(path: Path) -> None:
    path.write_bytes(TWO)


def same_time(path: Path) -> None:
    found = path.stat()
    path.write_bytes(TWO)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(TWO)
    path.with_suffix(".new").replace(path)


def replaced_and_back(path: Path) -> None:
    path.rename(path.with_suffix(".kept"))
    path.write_bytes(TWO)
    path.with_suffix(".kept").replace(path)


def written_and_back(path: Path) -> None:
    path.write_bytes(TWO)
    path.write_bytes(ONE)


def removed(path: Path) -> None:
    path.rename(path.with_suffix(".kept"))
    path.with_suffix(".kept").replace(path)


CHANGES = [in_place, same_time, replaced, replaced_and_back, written_and_back, removed]


def run(path: Path, cache: Cache) -> TorchModel:
    source = sources._source(path, "onnx", str(path))
    return again(source, cache)


def again(source: sources.Source, cache: Cache) -> TorchModel:
    plan = Plan((Step(0, Read(), {"model": -1}, "TorchModel", ()),), {})
    return execute(plan, source, cache, Log(source.path.with_suffix(".log")), Silence()).results[0]


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(ONE)
    yield path
    Read.meddle = staticmethod(lambda path: None)


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_read_leaves_nothing(model, tmp_path, change):
    cache = Cache(tmp_path / "cache")
    Read.meddle = staticmethod(change)
    with pytest.raises(ChangedError, match=r"model\.onnx changed while"):
        run(model, cache)
    assert not (tmp_path / "cache" / "steps").exists()
    assert list((tmp_path / "cache" / "running").iterdir()) == []
    Read.meddle = staticmethod(lambda path: None)
    model.write_bytes(ONE)
    assert (run(model, cache).path / "content").read_bytes() == ONE + ONE


@pytest.mark.parametrize("change", [in_place, same_time, replaced])
def test_a_source_that_changed_since_it_was_named_is_not_read(model, tmp_path, change):
    source = sources._source(model, "onnx", str(model))
    change(model)
    with pytest.raises(ChangedError, match=r"model\.onnx changed while"):
        again(source, Cache(tmp_path / "cache"))


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_that_is_turned_is_seen(model, tmp_path, folder):
    """As ``current`` in a folder of checkpoints, to and fro."""
    for name, content in (("a", ONE), ("b", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.onnx").write_bytes(content)
    link = tmp_path / "current"
    ends = ("a", "b") if folder else ("a/m.onnx", "b/m.onnx")
    link.symlink_to(ends[0])

    def turn(path: Path) -> None:
        for end in (ends[1], ends[0]):
            (tmp_path / "next").symlink_to(end)
            (tmp_path / "next").replace(link)

    Read.meddle = staticmethod(turn)
    with pytest.raises(ChangedError, match="changed while"):
        run(link / "m.onnx" if folder else link, Cache(tmp_path / "cache"))


def test_what_edgeship_writes_into_the_folder_of_the_source_is_no_part_of_it(cli, tiny_bundle, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    source = sources._source(folder, "huggingface", "model")
    shutil.copytree(tiny_bundle, folder / "out.edgeship")
    Log(folder / "out.edgeship.log").line("text")
    Cache(folder / "cache").scratch("k" * 64)
    assert sources.source_state(source)[0] == source.digest
    (folder / "notes.log").write_text("theirs")
    assert sources.source_state(source)[0] != source.digest


@dataclass(frozen=True)
class Uses(Read):
    """A pass with everything that may lie outside."""

    name: ClassVar[str] = "check/uses"
    data: DataRef | None = None
    adapters: tuple[AdapterRef, ...] = ()
    loss: str = ""
    loss_digest: str = ""
    notes: tuple[str, ...] = field(default=())


def data_file(place: Path) -> tuple[Uses, Path]:
    np.save(place / "data.npy", np.zeros(3))
    return Uses(describe_data(str(place / "data.npy"))), place / "data.npy"


def data_folder(place: Path) -> tuple[Uses, Path]:
    (place / "images" / "cat").mkdir(parents=True)
    (place / "images" / "cat" / "1.png").write_bytes(b"pixels")
    return Uses(describe_data(str(place / "images"))), place / "images" / "cat" / "1.png"


def adapter(place: Path) -> tuple[Uses, Path]:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / name).write_bytes(b"{}")
    return Uses(adapters=(AdapterRef("a", str(place), adapter_digest(place)),)), place / "adapter_model.safetensors"


def script(place: Path) -> tuple[Uses, Path]:
    (place / "loss.py").write_text("def loss(): ...")
    return Uses(
        loss=f"{place}/loss.py:loss", loss_digest=outside.script_digest(f"{place}/loss.py:loss")
    ), place / "loss.py"


@pytest.mark.parametrize("make", [data_file, data_folder, adapter, script])
@pytest.mark.parametrize("early", [True, False])
def test_everything_that_a_step_names_is_looked_at(tmp_path, make, early):
    task, file = make(tmp_path)
    look = Outside(task, {})
    look.begin()
    look.end()
    if early:
        file.write_bytes(TWO)
        with pytest.raises(ChangedError):
            Outside(task, {}).begin()
        return
    look.begin()
    before = file.read_bytes()
    file.write_bytes(TWO)
    file.write_bytes(before)
    with pytest.raises(ChangedError, match=file.name):
        look.end()


def test_an_image_that_is_added_is_seen(tmp_path):
    task, file = data_folder(tmp_path)
    look = Outside(task, {})
    look.begin()
    shutil.copy(file, file.with_name("2.png"))
    with pytest.raises(ChangedError, match="images changed"):
        look.end()


def checkpoint(path: Path, value: float) -> None:
    save_file({"w": torch.full((4, 4), value)}, path)


def test_weights_in_the_users_files_are_part_of_a_program(tmp_path):
    """Two checkpoints that lay in the same place are two programs, and a step that reads one never gets the other."""
    file = tmp_path / "model.safetensors"
    cache, digests = Cache(tmp_path / "cache"), []
    for number in (1, 2):
        checkpoint(file, number)
        folder = cache.scratch(str(number) * 64)
        (folder / "program").mkdir()
        save_floats(WeightStore({"w": Place(file, "w", kept=False)}), folder / "program")
        stored = cache.put(str(number) * 64, folder, TorchModel(folder / "program", Signature((), ())))
        digests.append(stored.digest)
        assert outside_files(stored.path) == {file: outside.source_digest(file)}
        Outside(Uses(), {"model": stored}).begin()
    assert digests[0] != digests[1]
    first = cache.get("1" * 64)
    with pytest.raises(ChangedError, match=r"model\.safetensors"):
        Outside(Uses(), {"model": first}).begin()


FACTORY = """
import numpy as np
import torch
from torch import nn


def model():
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.from_numpy(np.load("weights.npy")).float()
    return layer
"""


def weights_of(bundle: Path) -> np.ndarray:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(bundle / "onnx" / "model.onnx").graph
    return next(numpy_helper.to_array(item) for item in graph.initializer if list(item.dims) == [4, 4])


ORDER = ("--input", "x:f32[1,4]", "--target", "linux-x86", "--runtime", "onnx", "--profile", "exact")


def test_a_checkpoint_that_is_saved_over_while_it_is_read(cli, tmp_path, monkeypatch):
    """The build starts again and ends with the new one; the old one is not in the cache under the new one's name."""
    (tmp_path / "layer.py").write_text(
        "from torch import nn\ndef model():\n    return nn.Sequential(nn.Linear(4, 4, bias=False))\n"
    )
    path = tmp_path / "w.safetensors"
    save_file({"0.weight": torch.full((4, 4), 1.0) + torch.eye(4)}, path)
    old = path.read_bytes()
    real, turns = loader.sets_in, []

    def read(place: Path):
        state = real(place)
        if not turns:
            save_file({"0.weight": torch.full((4, 4), 2.0) + torch.eye(4)}, place)
        turns.append(place)
        return state

    monkeypatch.setattr(loader, "sets_in", read)
    order = (path, "--factory", f"{tmp_path}/layer.py:model", *ORDER)
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    ran = cli("build", *order, "-o", "out", env=env)
    assert ran.code == 0, ran.err
    assert len(turns) == 2
    assert sorted(set(weights_of(tmp_path / "out").ravel())) == [2, 3]
    path.write_bytes(old)
    assert cli("build", *order, "-o", "out", env=env).code == 0
    assert sorted(set(weights_of(tmp_path / "out").ravel())) == [1, 2]


def test_a_file_that_a_factory_reads_is_saved_over_before_it_is_hashed(cli, tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(FACTORY)
    np.save(tmp_path / "weights.npy", np.ones((4, 4)) + np.eye(4))
    real, turns = reads.Reads.digests, []

    def digests(self):
        if not turns:
            np.save(tmp_path / "new.npy", 2 * np.ones((4, 4)) + np.eye(4))
            (tmp_path / "new.npy").replace(tmp_path / "weights.npy")
        turns.append(self)
        return real(self)

    monkeypatch.setattr(reads.Reads, "digests", digests)
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    for _ in range(2):
        ran = cli("build", f"{tmp_path}/m.py:model", *ORDER, "-o", "out", env=env)
        assert ran.code == 0, ran.err
        assert sorted(set(weights_of(tmp_path / "out").ravel())) == [2, 3]
    assert len(turns) == 2


def test_a_factory_may_write_what_it_reads(cli, tmp_path):
    """A download that is unpacked beside the model, for one."""
    text = FACTORY.replace("    layer =", '    np.save("weights.npy", np.ones((4, 4)))\n    layer =')
    (tmp_path / "m.py").write_text(text)
    assert cli("build", f"{tmp_path}/m.py:model", *ORDER, "-o", "out").code == 0


def test_a_module_may_change_where_python_looks(cli, tmp_path, monkeypatch):
    """The place of a module is part of its name, and many add to it as they are imported."""
    text = FACTORY.replace(
        "def model():", "import sys\nsys.path.append('/')\ndef model():\n    sys.path.append('/usr')"
    )
    (tmp_path / "paths_for_outside.py").write_text(text)
    np.save(tmp_path / "weights.npy", np.ones((4, 4)))
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = cli("build", "paths_for_outside:model", *ORDER, "-o", "out")
    assert ran.code == 0, ran.err


def test_a_source_that_never_rests_is_an_error_of_one_line(cli, tmp_path, monkeypatch):
    (tmp_path / "layer.py").write_text("from torch import nn\ndef model():\n    return nn.Linear(4, 4)\n")
    path = tmp_path / "w.safetensors"
    save_file(nn.Linear(4, 4).state_dict(), path)
    real = loader.sets_in

    def read(place: Path):
        save_file(nn.Linear(4, 4).state_dict(), place)
        return real(place)

    monkeypatch.setattr(loader, "sets_in", read)
    ran = cli("build", path, "--factory", f"{tmp_path}/layer.py:model", *ORDER, "-o", "out")
    assert ran.code == 3
    assert "w.safetensors changed while the build read it; wait until it is written" in ran.errors[0]
    assert len(ran.errors) == 1


def test_places_are_written_with_digests(tmp_path):
    checkpoint(tmp_path / "m.safetensors", 1)
    save_floats(WeightStore({"w": Place(tmp_path / "m.safetensors", "w", kept=False)}), tmp_path)
    assert json.loads((tmp_path / "weights.json").read_text())["outside"].keys() == {str(tmp_path / "m.safetensors")}
    assert outside_files(tmp_path / "nowhere") == {}


@pytest.mark.heavy
def test_another_checkpoint_in_the_same_place(cli, family, tmp_path):
    """A language model's weights stay in the user's files: what is made of them is never taken for that of others."""
    shutil.copytree(family("llama"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    first = load_file(file)
    second = {
        name: value + 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        for name, value in first.items()
    }
    order = ("--target", "linux-x86", "--runtime", "onnx", "--context", "64")
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    made = []
    for number, state in enumerate((first, second, first)):
        save_file(state, file, metadata={"format": "pt"})
        ran = cli("build", tmp_path / "m", *order, "-o", f"out{number}", env=env)
        assert ran.code == 0, ran.err
        (weights,) = (tmp_path / f"out{number}").rglob("model.data")
        made.append(weights.read_bytes())
    ran = cli("build", tmp_path / "m", *order, "-o", "fresh", env={"EDGESHIP_CACHE": str(tmp_path / "fresh-cache")})
    assert ran.code == 0, ran.err
    assert made[0] == made[2] != made[1]
    assert next((tmp_path / "fresh").rglob("model.data")).read_bytes() == made[0]
