"""Ctrl-C stops with 130 and one line, also where a library catches it."""

import pytest

FACTORY = """
import os, signal, time
from torch import nn

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)

def plain():
    press()

def swallowed():
    try:
        press()
    except BaseException:
        pass
    return nn.Linear(4, 2)

def renamed():
    try:
        press()
    except BaseException as error:
        raise RuntimeError("Unable to configure default ndarray.__str__") from error

def twice():
    try:
        press()
    except BaseException:
        press()
"""


@pytest.mark.parametrize("function", ["plain", "swallowed", "renamed", "twice"])
def test_a_press_stops_the_build(cli_process, tmp_path, function):
    (tmp_path / "m.py").write_text(FACTORY)
    order = (f"m.py:{function}", "--input", "x:f32[1,4]", "--target", "linux-x86", "--runtime", "onnx", "-o", "out")
    ran = cli_process("build", *order)
    assert ran.code == 130, ran.err
    said = [line for line in ran.err.splitlines() if line and not line.startswith(("+", "!"))]
    assert said == ["stopped; run the same command again to go on where it stopped"]
    assert not (tmp_path / "out").exists()
    assert not ran.out
