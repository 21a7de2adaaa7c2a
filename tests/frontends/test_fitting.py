"""Checkpoints as trainers write them: the set that fits is found, by facts, and nothing in the file runs."""

from __future__ import annotations

import argparse
import copy
import enum
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeship.errors import SourceError, UnsafeSourceError, WeightsError
from edgeship.frontends.fitting import fill
from edgeship.frontends.state_dicts import whole_module
from edgeship.passes.load.weights import sets_in


class Net(nn.Module):
    """A convolution, a batch norm, and a head in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 4, 5))
        self.register_buffer("places", torch.arange(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


def trained(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    net = Net()
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.1)
    return net.eval()


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


@contextmanager
def module_named(name: str, **members: type) -> Iterator[None]:
    """A module of this name with these classes for a while, so that they are pickled under it."""
    made = types.ModuleType(name)
    parts = name.split(".")
    heads = [".".join(parts[:count]) for count in range(1, len(parts))]
    fresh = [head for head in heads if head not in sys.modules]
    for head in fresh:
        sys.modules[head] = types.ModuleType(head)
    for key, value in members.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    sys.modules[name] = made
    try:
        yield
    finally:
        for key in [name, *fresh]:
            del sys.modules[key]


def with_class(name: str, kind: str, base: type, make: Callable[[type], Any]) -> bytes:
    """What torch.save writes of something that holds an object of a class that nobody here has."""
    cls = type(kind, (base,), {})
    buffer = io.BytesIO()
    with module_named(name, **{kind: cls}):
        torch.save(make(cls), buffer)
    return buffer.getvalue()


def lightning(net: Net) -> bytes:
    def make(cls: type) -> dict[str, Any]:
        parameters = cls({"lr": 0.1, "args": argparse.Namespace(width=4)})
        state = prefixed(net.state_dict(), "model.")
        state["criterion.weight"] = torch.ones(5)
        return {
            "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.4.0", "state_dict": state, "loops": {},
            "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best": torch.tensor(0.5)}}, "lr_schedulers": [],
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4, 3, 3, 3)}}, "param_groups": [{"lr": 0.1}]}],
            "hparams_name": "kwargs", "hyper_parameters": parameters,
        }  # fmt: skip

    return with_class("pytorch_lightning.utilities.parsing", "AttributeDict", dict, make)


def omegaconf(net: Net) -> bytes:
    def make(cls: type) -> dict[str, Any]:
        node = cls.__new__(cls)
        node.__dict__.update({"_metadata": {"ref_type": Any}, "_content": {"lr": 0.1}})
        return {"state_dict": prefixed(net.state_dict(), "net."), "hyper_parameters": {"cfg": node}}

    return with_class("omegaconf.dictconfig", "DictConfig", object, make)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def torchvision_reference(net: Net) -> bytes:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    args = argparse.Namespace(model="net", data_path=Path("/data"), lr=0.1, opt="sgd")
    return saved({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "args": args,
                  "lr_scheduler": {"_last_lr": [0.1]}})  # fmt: skip


def adam(net: Net) -> bytes:
    moving = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(moving.parameters())
    moving(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    return saved({"network": net.state_dict(), "optimizer": optimizer.state_dict(), "best": np.float64(0.5)})


def detectron(net: Net) -> bytes:
    """A zoo that pickles arrays of numpy, with Python's own pickle."""
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    return pickle.dumps({"model": arrays, "__author__": "somebody", "matching_heuristics": True}, protocol=2)


WRITERS: dict[str, Callable[[Net], bytes]] = {
    "state_dict.pth": lambda net: saved(net.state_dict()),
    "old_form.pth": lambda net: saved(net.state_dict(), _use_new_zipfile_serialization=False),
    "imagenet.pth.tar": lambda net: saved({
        "epoch": 90, "arch": "net", "state_dict": prefixed(net.state_dict(), "module."), "best_acc1": torch.tensor(76.0),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1).state_dict(),
    }),
    "old_imagenet.pth.tar": lambda net: saved(
        {"state_dict": prefixed(net.state_dict(), "module.")}, _use_new_zipfile_serialization=False
    ),
    "torchvision.pth": torchvision_reference,
    "timm.pth.tar": lambda net: saved({
        "epoch": 1, "arch": "net", "state_dict": net.state_dict(), "optimizer": {"state": {}, "param_groups": []},
        "version": 2, "args": argparse.Namespace(model="net", mean=None), "amp_scaler": {"scale": 65536.0},
        "metric": np.float32(0.7),
    }),
    "lightning.ckpt": lightning,
    "lightning_omegaconf.ckpt": omegaconf,
    "compiled.pt": lambda net: saved({"model": prefixed(net.state_dict(), "_orig_mod.")}),
    "compiled_ddp.pt": lambda net: saved({"model": prefixed(net.state_dict(), "module._orig_mod.")}),
    "compiled_lightning.ckpt": lambda net: saved({"state_dict": prefixed(net.state_dict(), "model._orig_mod.")}),
    "compiled_part.pt": lambda net: saved({
        name.replace("head.", "head._orig_mod."): value for name, value in net.state_dict().items()
    }),
    "pytorch_model.bin": lambda net: saved(net.state_dict()),
    "adam.pt": adam,
    "nested.pt": lambda net: saved({"checkpoint": {"weights": {"net": net.state_dict()}}}),
    "halves.pt": lambda net: saved(net.half().state_dict()),
    "detectron.pkl": detectron,
    "whole.pt": saved,
    "yolo.pt": lambda net: saved({"epoch": -1, "best_fitness": None, "model": net.half(), "ema": None, "date": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_what_trainers_write_fits(tmp_path: Path, name: str) -> None:
    net = trained()
    (tmp_path / name).write_bytes(WRITERS[name](copy.deepcopy(net)))
    blank = Net().eval()
    remarks = fill(blank, sets_in(tmp_path / name), name)
    x = torch.randn(2, 3, 4, 4)
    tolerance = 2e-3 if name in ("halves.pt", "yolo.pt") else 0.0
    torch.testing.assert_close(blank(x), net(x), rtol=tolerance, atol=tolerance)
    assert any("pickled module" in remark for remark in remarks) == (name in ("whole.pt", "yolo.pt"))
    assert any("criterion.weight" in remark for remark in remarks) == (name == "lightning.ckpt")


def averaged(net: Net, average: Net) -> dict[str, Any]:
    average_state = {"n_averaged": torch.tensor(4), **prefixed(average.state_dict(), "module.")}
    return {"model": net.state_dict(), "model_ema": average_state, "epoch": 1}


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_one_of_several_sets_that_fit_is_the_users_choice(tmp_path: Path, key: str) -> None:
    nets = {"model": trained(1), "model_ema": trained(2)}
    torch.save(averaged(nets["model"], nets["model_ema"]), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds 2 sets of weights that fit the model: model, model_ema") as caught:
        fill(Net(), sets_in(tmp_path / "w.pth"), "w.pth")
    assert caught.value.fix == "choose one, such as --weights-key model"
    blank = Net().eval()
    fill(blank, sets_in(tmp_path / "w.pth"), "w.pth", key)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(blank(x), nets[key](x))


def test_sets_under_two_prefixes_are_two_sets(tmp_path: Path) -> None:
    state = {**prefixed(trained(1).state_dict(), "student."), **prefixed(trained(2).state_dict(), "teacher.")}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match=r"fit the model: state_dict\.student, state_dict\.teacher"):
        fill(Net(), sets_in(tmp_path / "w.ckpt"), "w.ckpt")
    blank = Net().eval()
    (remark, _) = fill(blank, sets_in(tmp_path / "w.ckpt"), "w.ckpt", "state_dict.teacher")
    assert "state_dict.teacher" in remark
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(blank(x), trained(2)(x))


def test_a_key_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    torch.save({"net": trained().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no weights under 'model'") as caught:
        fill(Net(), sets_in(tmp_path / "w.pth"), "w.pth", "model")
    assert caught.value.fix == "it has net"


def test_one_set_under_two_keys_is_one(tmp_path: Path) -> None:
    state = trained().state_dict()
    torch.save({"model": state, "state_dict": state}, tmp_path / "w.pth")
    fill(Net(), sets_in(tmp_path / "w.pth"), "w.pth")


def test_names_that_do_not_fit_stand_beside_the_models(tmp_path: Path) -> None:
    state = {name.replace("stem.", "conv1."): value for name, value in trained().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        fill(Net(), sets_in(tmp_path / "w.pth"), "w.pth")
    told = str(caught.value)
    assert "lacks the weight stem.weight" in told
    assert "2 missing, 2 unknown" in told
    assert "conv1.weight for stem.weight, conv1.bias for stem.bias" in told
    assert "\n" not in told


def test_tied_weights_and_old_buffers_are_no_faults(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.table.weight
            self.register_buffer("places", torch.arange(3), persistent=False)

    torch.save({"table.weight": torch.ones(6, 4), "places": torch.arange(3)}, tmp_path / "w.pth")
    blank = Tied()
    fill(blank, sets_in(tmp_path / "w.pth"), "w.pth")
    assert torch.equal(blank.out.weight, torch.ones(6, 4))


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(["", "model", "state_dict", "net.weights"]),
    before=st.sampled_from(["", "module.", "model.", "_orig_mod.", "a.b."]),
    outside=st.booleans(), zipped=st.booleans(),
)  # fmt: skip
def test_any_key_and_any_prefix(tmp_path_factory: Any, key: str, before: str, outside: bool, zipped: bool) -> None:
    net = trained()
    state: Any = prefixed(net.state_dict(), before)
    if outside and before:
        state["loss.weight"] = torch.ones(3)
    for part in reversed(key.split(".") if key else []):
        state = {part: state, "epoch": 1}
    path = tmp_path_factory.mktemp("any") / "w.pt"
    path.write_bytes(saved(state, _use_new_zipfile_serialization=zipped))
    blank = Net().eval()
    if outside and before in ("module.", "_orig_mod."):
        # A wrapper has no other part.
        with pytest.raises(WeightsError, match=r"holds loss\.weight, which the model does not have"):
            fill(blank, sets_in(path), "w.pt")
        return
    fill(blank, sets_in(path), "w.pt")
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(blank(x), net(x))


def test_a_whole_module_is_told_as_one(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "whole.pt")
    assert whole_module(tmp_path / "whole.pt") == f"{__name__}.Net"
    torch.save(trained().state_dict(), tmp_path / "state.pt")
    assert whole_module(tmp_path / "state.pt") == ""


class Mode(enum.Enum):
    FAST = "fast"


def test_a_call_beside_the_weights_is_refused_by_its_name(tmp_path: Path) -> None:
    """An enum calls its class with a value, as a command would be: which of them it is nothing says."""
    torch.save({"state_dict": trained().state_dict(), "mode": Mode.FAST}, tmp_path / "w.pth")
    with pytest.raises(UnsafeSourceError, match=r"holds more than tensors: .*Mode"):
        sets_in(tmp_path / "w.pth")


def test_no_object_is_made_and_no_hook_is_called(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Setting:
        def __setstate__(self, state: Any) -> None:
            canary.write_text("ran")

    content = with_class("trainer.settings", "Setting", Setting, lambda cls: {"w": torch.ones(2), "s": _with(cls)})
    (tmp_path / "w.pt").write_bytes(content)
    (found,) = sets_in(tmp_path / "w.pt")
    assert found.shapes == {"w": (2,)}
    assert not canary.exists()


def _with(cls: type) -> Any:
    made = cls.__new__(cls)
    made.value = 1
    return made


def test_a_file_without_weights_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match="is not a state dict"):
        fill(Net(), sets_in(tmp_path / "w.pt"), "w.pt")
