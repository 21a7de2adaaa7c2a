"""Compile an ONNX file for Hexagon in a child process, and say in one line why it could not be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeship.errors import LoweringError, UnsupportedOpError
from edgeship.lowering.qnn.provider import Hexagon

PAIRS = ("QuantizeLinear", "DequantizeLinear")
# What a DLC records besides the model: when it was made. Same length, so that the archive stays valid.
_TIMESTAMP = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC")
_EPOCH = b"1980-01-01 00:00:00 UTC"


class Compiler:
    """The child process, for one model and one chip.

    Args:
        model: the ONNX file. Its folder becomes the child's, and its name all that the compiler hears of the path: the
            graph's name is a digest of it, and builds in other folders must give the same bytes.
        timeout_s: for each action.
    """

    def __init__(self, model: Path, chip: Hexagon, timeout_s: float, log: Callable[[str], None]) -> None:
        self._model = model
        self._chip = chip
        self._timeout_s = timeout_s
        self._log = log

    def write_context(self, name: str) -> None:
        """Write the EPContext model ``name`` and its binary beside the model.

        Raises:
            UnsupportedOpError: operators stay off the HTP.
            LoweringError: the compiler failed, crashed or took too long.
        """
        answer = self._ask("compile", context=name)
        if "error" in answer:
            raise self._explained(answer["error"])
        self._check_whole(self._model.parent / name)

    def write_dlc(self, name: str) -> None:
        """Write the SoC-independent DLC ``name`` beside the model."""
        folder = self._model.parent / "dlc"
        folder.mkdir()
        answer = self._ask("dlc", folder="dlc")
        written = sorted(folder.glob("*.dlc"))
        if "error" in answer or len(written) != 1:
            raise LoweringError(
                f"QNN wrote {len(written)} DLC files: {_first_line(answer.get('error', ''))}",
                fix="leave out runtime qnn, or ship the context binary alone",
            )
        (self._model.parent / name).write_bytes(_TIMESTAMP.sub(_EPOCH, written[0].read_bytes()))
        written[0].unlink()
        folder.rmdir()

    def _ask(self, action: str, **details: str) -> dict[str, Any]:
        job = {"model": self._model.name, "chip": asdict(self._chip), **details}
        command = [sys.executable, "-m", "edgeship.lowering.qnn.worker", action, json.dumps(job)]
        try:
            done = subprocess.run(
                command,
                cwd=self._model.parent,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LoweringError(
                f"the QNN compiler did not finish in {self._timeout_s:g} s",
                fix="give lower/onnx_to_qnn.timeout_s more, or compile on a larger host",
            ) from None
        printed = done.stderr.decode(errors="replace")
        for line in printed.splitlines():
            self._log(f"qnn {action}: {line}")
        if done.returncode or not done.stdout:
            raise LoweringError(
                f"the QNN compiler ended with code {done.returncode} during {action}: {_last_line(printed)}",
                fix="look at the log; the model may need more memory than this host has",
            )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def _explained(self, error: str) -> LoweringError | UnsupportedOpError:
        left = self._ask("survey").get("left", [])
        computing = [(op, node) for op, node in left if op not in PAIRS] or left
        if not computing:
            return LoweringError(f"QNN could not compile the graph: {_first_line(error)}", fix="look at the log")
        made = self._values()
        by_op: dict[str, list[str]] = {}
        for op, node in computing:
            by_op.setdefault(op, []).append(made.get(node, node))
        named = ", ".join(f"{op} ({', '.join(nodes[:3])}{', ...' * (len(nodes) > 3)})" for op, nodes in by_op.items())
        return UnsupportedOpError(
            f"Hexagon does not run {named}", fix="write those steps with other operators, or leave out runtime qnn"
        )

    def _values(self) -> dict[str, str]:
        """What each node makes, by node name: the values keep the torch graph's names where nodes do not."""
        import onnx

        graph = onnx.load(self._model, load_external_data=False).graph
        return {node.name: node.output[0] for node in graph.node if node.output}

    @staticmethod
    def _check_whole(context: Path) -> None:
        import onnx

        nodes = [node.op_type for node in onnx.load(context, load_external_data=False).graph.node]
        if nodes != ["EPContext"]:
            raise LoweringError(f"the context model holds {', '.join(nodes)}", fix="report this as a bug")


def child_environment() -> dict[str, str]:
    """The environment for a child that imports the same edgeship as this process."""
    paths = [path for path in sys.path if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _first_line(text: str) -> str:
    return next((" ".join(line.split())[:300] for line in text.splitlines() if line.strip()), "no message")


def _last_line(text: str) -> str:
    clean = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return next((" ".join(line.split())[:300] for line in reversed(clean.splitlines()) if line.strip()), "no message")
