"""The child process that holds Qualcomm's library: ``python -m edgeship.lowering.qnn.worker ACTION JOB``.

ACTION is ``compile`` (context binary), ``dlc``, ``survey`` (which nodes stay off the HTP), ``save`` (what the compiler
was given, for reading back) or ``serve`` (run a compiled model on frames from stdin). JOB is JSON. The library prints,
and can crash: results go to the first stdout, everything printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from edgeship.data.frames import read_arrays, write_arrays
from edgeship.lowering.qnn.provider import PROVIDER, Hexagon, open_session, provider_options

WHOLE_GRAPH = {"session.disable_cpu_ep_fallback": "1"}


def compile_context(job: dict[str, Any]) -> dict[str, Any]:
    """Write ``context`` (ONNX) and its binary beside it."""
    entries = {
        **WHOLE_GRAPH,
        "ep.context_enable": "1",
        "ep.context_file_path": job["context"],
        "ep.context_embed_mode": "0",
    }
    open_session(job["model"], provider_options(Hexagon(**job["chip"])), entries)
    return {}


def write_dlc(job: dict[str, Any]) -> dict[str, Any]:
    """Write a SoC-independent DLC into ``folder``. A session of its own: with a context it fails after writing."""
    import onnxruntime_qnn

    options = {
        **provider_options(Hexagon(**job["chip"])),
        "dump_qnn_ir_dlc": "1",
        "dump_qnn_ir_dlc_dir": job["folder"],
        "qnn_ir_backend_path": str(Path(onnxruntime_qnn.LIB_DIR_FULL_PATH, "libQnnIr.so")),
    }
    open_session(job["model"], options, WHOLE_GRAPH)
    return {}


def survey(job: dict[str, Any]) -> dict[str, Any]:
    """Which nodes the HTP refuses: ``{"left": [[operator, node], ...]}``."""
    entries = {"session.record_ep_graph_assignment_info": "1"}
    session = open_session(job["model"], provider_options(Hexagon(**job["chip"])), entries)
    left = []
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != PROVIDER:
            left += [[node.op_type, node.name] for node in part.get_nodes()]
    return {"left": left}


def save_inputs(job: dict[str, Any]) -> dict[str, Any]:
    """Let QNN's Saver write what the compiler is given, into ``saver_output`` of the current folder."""
    import onnxruntime_qnn

    options = provider_options(Hexagon(**job["chip"]))
    options["qnn_saver_path"] = str(Path(onnxruntime_qnn.LIB_DIR_FULL_PATH, "libQnnSaver.so"))
    open_session(job["model"], options, WHOLE_GRAPH)
    return {}


def serve(job: dict[str, Any], answers: IO[bytes]) -> None:
    """Answer frames of inputs with frames of outputs until stdin ends; ``!error`` holds a failure's text."""
    import numpy as np

    session = open_session(job["model"], provider_options(Hexagon(**job["chip"])), WHOLE_GRAPH)
    names = [output.name for output in session.get_outputs()]
    write_arrays(answers, {})
    while (inputs := read_arrays(sys.stdin.buffer)) is not None:
        try:
            results = dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:  # whatever ONNX Runtime raises; the parent makes it one line
            results = {"!error": np.array(str(error))}
        write_arrays(answers, results)


ACTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "compile": compile_context,
    "dlc": write_dlc,
    "survey": survey,
    "save": save_inputs,
}


def main(action: str, job: dict[str, Any]) -> None:
    """Run one action, with the real stdout kept for its result."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if action == "serve":
        serve(job, answers)
        return
    try:
        result = ACTIONS[action](job)
    except Exception as error:  # whatever ONNX Runtime raises; the parent makes it one line
        result = {"error": str(error)}
    answers.write(json.dumps(result).encode())
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    # The vendor library sometimes crashes while it is unloaded, after the work is done.
    sys.stderr.flush()
    os._exit(0)
