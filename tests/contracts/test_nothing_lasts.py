"""A build leaves the process as it found it: no patch, no setting, no hook outlives the call that needed it."""

from __future__ import annotations

import builtins
import gc
import importlib
import io
import logging
import os
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import edgeship

# What a build loads anyway: what these do to the process when they are imported is their own.
LIBRARIES = (
    "onnxruntime", "onnxscript.optimizer", "onnxscript.rewriter", "coremltools", "litert_torch", "safetensors.torch",
    "coreai.authoring", "coreai_torch", "ai_edge_litert.interpreter", "transformers", "torch.onnx", "torch.export",
)  # fmt: skip
# Their functions and classes are looked at, in every module that is loaded.
WATCHED = {name.partition(".")[0] for name in LIBRARIES} | {"torch", "safetensors", "json", "pickle", "numpy", "scipy"}


def settings() -> dict[str, Any]:
    """What the process and its libraries are set to."""
    root = logging.getLogger()
    loggers = {name: item for name, item in logging.root.manager.loggerDict.items() if isinstance(item, logging.Logger)}
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "sys.meta_path": list(sys.meta_path),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.displayhook),
        "tracing": (sys.gettrace(), sys.getprofile(), sys.getrecursionlimit()),
        "signals": {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)},
        "threads": threading.excepthook,
        "warnings": list(warnings.filters),
        "root logger": (root.level, list(root.handlers), list(root.filters), logging.root.manager.disable),
        "levels": {name: (item.level, item.disabled, list(item.filters)) for name, item in loggers.items()},
        "collector": (
            gc.isenabled(),
            gc.get_threshold(),
            gc.get_freeze_count() > 2000,
        ),  # Python 3.12 has some of its own
        "random": random.getstate(),
        "numpy": (np.geterr(), [str(item) for item in np.random.get_state()]),
        "torch numbers": torch.get_rng_state().tolist(),
        "torch": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.enabled,
            torch.is_autocast_enabled("cpu"),
        ),
        "hooks of modules": {
            name: dict(value)
            for name, value in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and isinstance(value, dict)
        },
        "builtins": dict(vars(builtins)),
        "io": (io.open, os.open, os.write, os.stat),
    }


def functions() -> dict[str, object]:
    """Every function and class in the watched libraries' modules, and what is in their classes, by name."""
    found: dict[str, object] = {}
    for place, module in list(sys.modules.items()):
        if place.partition(".")[0] in WATCHED and isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                found.update(named(f"{place}.{name}", value))
    return found


def named(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A function by its name; a class with what is in it."""
    if isinstance(value, type):
        yield name, value
        if name.startswith(f"{value.__module__}."):
            yield from ((f"{name}.{key}", item) for key, item in list(vars(value).items()) if is_fixed(item))
    elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        yield name, value


def is_fixed(item: object) -> bool:
    """Whether a library does not change it itself, as it does its counters and what it computes when it is asked."""
    return isinstance(item, (types.FunctionType, classmethod, staticmethod, tuple, dict, list, type))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 1.0 - self.head(torch.relu(self.conv(image)).mean((2, 3)))


RUNTIMES = ("onnx", "coreml", "coreai", "tflite")


def build(tmp_path, runtime: str) -> None:
    torch.manual_seed(3)
    model = Net().eval()
    state = torch.get_rng_state()
    bundle = edgeship.build(
        model, torch.zeros(1, 2, 8, 8), target="iphone15pro" if runtime.startswith("core") else "pixel9",
        runtime=runtime, output=tmp_path / f"{runtime}.edgeship",
    )  # fmt: skip
    assert bundle.passed
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    "runtime", [RUNTIMES[0], *(pytest.param(name, marks=pytest.mark.heavy) for name in RUNTIMES[1:])]
)
def test_a_build_leaves_the_process_as_it_was(runtime, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGESHIP_CACHE", str(tmp_path / "cache"))
    for name in LIBRARIES:
        importlib.import_module(name)
    torch.manual_seed(3)
    Net()
    before, known = settings(), functions()
    build(tmp_path, runtime)
    after, now = settings(), functions()
    # Loggers that were made meanwhile have no state to be put back.
    levels, levels_now = before.pop("levels"), after.pop("levels")
    assert {name: (level, levels_now[name]) for name, level in levels.items() if levels_now[name] != level} == {}
    assert {name: (before[name], after[name]) for name in before if after[name] != before[name]} == {}
    assert {name for name, value in known.items() if now.get(name, value) is not value} == set()
