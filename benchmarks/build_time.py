"""How long one build for five runtimes takes, checks included, beside the makers' converters one after the other.

``python benchmarks/build_time.py`` runs, in each round and for each network, our build in a process with an empty cache,
and then torch.onnx.export, coremltools, litert-torch, coreai-torch and QNN's compiler, each in a process of its own as
their users run them. Times are wall clock from start to end of a process; memory is the most that a process and all its
children hold at once (proportional set size where the system tells it). Run it on a calm machine. ``--parts`` times our
build with ``--jobs 1`` too; ``--networks tiny`` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "docs" / "results" / "build-time.json"
PHONES = ("--target", "iphone15pro", "--target", "galaxy-s24")
MAKERS = ("onnx", "coreml", "tflite", "coreai", "qnn")
# Share of the makers' time that is wanted at most.
WANTED = 0.6
# (name, module in this folder, function, inputs): a float input is an image, others are tokens and their mask.
NETWORKS = {
    "MobileNetV3": ("networks", "mobilenet_v3", ("image:f32[1,3,224,224]",)),
    "YOLO11n": ("yolo11", "yolo11n", ("image:f32[1,3,640,640]",)),
    "MiniLM": ("models", "minilm", ("input_ids:i64[1,128]", "attention_mask:i64[1,128]")),
    "ViT-B": ("models", "vit_b16", ("pixel_values:f32[1,3,224,224]",)),
    "tiny": ("networks", "tcn", ("mel:f32[1,40,100]",)),
}
# The chip of the second phone, for the compiler.
SOC, ARCH = "57", "75"


def make(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A network in eval mode, and example inputs."""
    import importlib

    import torch

    from edgeship.data.specs import parse_inputs

    sys.path.insert(0, str(HERE))
    module, function, texts = NETWORKS[name]
    network = getattr(importlib.import_module(module), function)().eval()
    specs = parse_inputs(texts)
    floats = [torch.randn(spec.shape) if spec.is_float else torch.ones(spec.shape, dtype=torch.int64) for spec in specs]
    return network, tuple(floats)


def export_onnx(network: Any, inputs: tuple[Any, ...], folder: Path) -> Path:
    """Torch's own exporter."""
    import torch

    path = folder / "model.onnx"
    torch.onnx.export(network, inputs, path, dynamo=True)
    return path


def export_coreml(network: Any, inputs: tuple[Any, ...], folder: Path) -> None:
    """Coremltools on an exported program."""
    import coremltools as ct
    import torch

    program = torch.export.export(network, inputs).run_decompositions({})
    ct.convert(program, minimum_deployment_target=ct.target.iOS17).save(str(folder / "model.mlpackage"))


def export_tflite(network: Any, inputs: tuple[Any, ...], folder: Path) -> None:
    """litert-torch."""
    import litert_torch

    litert_torch.convert(network, inputs).export(str(folder / "model.tflite"))


def export_coreai(network: Any, inputs: tuple[Any, ...], folder: Path) -> None:
    """coreai-torch."""
    import torch
    from coreai_torch import TorchConverter, get_decomp_table

    program = torch.export.export(network, inputs).run_decompositions(get_decomp_table())
    converter = TorchConverter()
    converter.add_exported_program(program)
    converter.to_coreai().save_asset(folder / "model.aimodel")


def export_qnn(network: Any, inputs: tuple[Any, ...], folder: Path) -> None:
    """Torch's ONNX file through onnxruntime's QNN provider in float16, into a context binary."""
    import onnxruntime as ort
    import onnxruntime_qnn

    path = export_onnx(network, inputs, folder)
    ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
    options = ort.SessionOptions()
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(folder / "context.onnx"))
    options.add_session_config_entry("ep.context_embed_mode", "0")
    options.add_provider_for_devices(
        devices,
        {
            "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
            "soc_model": SOC,
            "htp_arch": ARCH,
            "enable_htp_fp16_precision": "1",
            "htp_graph_finalization_optimization_mode": "3",
        },
    )
    ort.InferenceSession(str(path), options)


EXPORTS = {
    "onnx": export_onnx, "coreml": export_coreml, "tflite": export_tflite, "coreai": export_coreai, "qnn": export_qnn,
}  # fmt: skip


def convert(name: str, maker: str, folder: Path) -> None:
    """In a process of its own: one maker's converter on one network."""
    network, inputs = make(name)
    EXPORTS[maker](network, inputs, folder)
    # QNN's library sometimes crashes while it is unloaded.
    sys.stdout.flush()
    os._exit(0)


def factory() -> Any:
    """For our build: the network that an environment variable names."""
    return make(os.environ["BUILD_TIME_NETWORK"])[0]


class Watch(threading.Thread):
    """The most memory that a process and its children hold, in bytes, asked ten times a second."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self._number, self.peak = number, 0

    def run(self) -> None:
        """Look until the process is gone."""
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(self._number)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                held = 0
                for item in [process, *process.children(recursive=True)]:
                    with suppress(psutil.Error):
                        info = item.memory_full_info()
                        held += getattr(info, "pss", info.rss)
                self.peak = max(self.peak, held)
                time.sleep(0.1)


def timed(command: Sequence[str], environment: dict[str, str], log: Path) -> dict[str, float]:
    """Seconds, peak bytes and exit code of a command; the end of its output is printed when it fails."""
    with log.open("wb") as file:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file)
        watch = Watch(process.pid)
        watch.start()
        code = process.wait()
        seconds = time.perf_counter() - begin
    watch.join()
    if code:
        print(f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-2000:]}", flush=True)
    return {"seconds": seconds, "bytes": watch.peak, "code": code}


def ours(name: str, folder: Path, options: Sequence[str] = ()) -> dict[str, float]:
    """Our build for five runtimes with everything that it checks, from an empty cache."""
    texts = [word for text in NETWORKS[name][2] for word in ("--input", text)]
    command = [sys.executable, "-m", "edgeship.cli.main", "build", f"{__file__}:factory", *texts, *PHONES, *options]
    environment = {"BUILD_TIME_NETWORK": name, "EDGESHIP_CACHE": str(folder / "cache")}
    found = timed([*command, "-o", str(folder / "out.edgeship")], environment, folder / "log.txt")
    shutil.rmtree(folder / "cache")
    return found


def theirs(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Each maker's converter, one after the other."""
    found = {}
    for maker in MAKERS:
        place = folder / maker
        place.mkdir()
        command = [sys.executable, __file__, "--one", name, maker, str(place)]
        found[maker] = timed(command, {}, folder / f"{maker}.txt")
        print(f"  {maker}: {found[maker]['seconds']:.1f} s, {found[maker]['bytes'] / 1e9:.2f} GB", flush=True)
    return found


def one_round(name: str, parts: bool) -> dict[str, Any]:
    """Ours and theirs once."""
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    for label, options in {"ours": (), "in order": ("--jobs", "1")}.items():
        if label == "ours" or parts:
            with tempfile.TemporaryDirectory() as place:
                found[label] = ours(name, Path(place), options)
            print(f"  {label}: {found[label]['seconds']:.1f} s, {found[label]['bytes'] / 1e9:.2f} GB", flush=True)
    with tempfile.TemporaryDirectory() as place:
        found["theirs"] = theirs(name, Path(place))
    return found


def row(name: str, rounds: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A line of the table: medians over rounds."""
    mine = [item["ours"]["seconds"] for item in rounds]
    each = {maker: statistics.median(item["theirs"][maker]["seconds"] for item in rounds) for maker in MAKERS}
    sums = [sum(part["seconds"] for part in item["theirs"].values()) for item in rounds]
    ratio = statistics.median(mine) / statistics.median(sums)
    failed = {maker for item in rounds for maker, part in item["theirs"].items() if part["code"]}
    alone = [item["in order"]["seconds"] for item in rounds if "in order" in item]
    peaks = [max(item["ours"]["bytes"] for item in rounds)]
    peaks.append(max(part["bytes"] for item in rounds for part in item["theirs"].values()))
    return (
        name + " (ours failed)" * any(item["ours"]["code"] for item in rounds),
        _spread(mine),
        _spread(alone) if alone else "-",
        _spread(sums),
        ", ".join(f"{maker} {seconds:.1f}{' (failed)' * (maker in failed)}" for maker, seconds in each.items()),
        f"{ratio:.2f} ({'met' if ratio <= WANTED else 'missed'})",
        " / ".join(f"{peak / 1e9:.2f} GB" for peak in peaks),
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} s ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    """Run rounds, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=[name for name in NETWORKS if name != "tiny"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="time our build with --jobs 1 too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        convert(asked.one[0], asked.one[1], Path(asked.one[2]))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.networks}
    for number in range(asked.rounds):
        for name in asked.networks:
            print(f"round {number + 1}, {name}", flush=True)
            found[name].append(one_round(name, asked.parts))
            if name != "tiny":
                KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "tiny" in found:
        print(*row("tiny", found["tiny"]), sep=" | ")
        return
    write(found)


def write(found: dict[str, list[dict[str, Any]]]) -> None:
    """The page of results."""
    from results import write_page

    loads = [item["load"] for rounds in found.values() for item in rounds]
    write_page(
        "build-time",
        "Building time: five runtimes with all checks, beside the makers' converters",
        "python benchmarks/build_time.py --parts",
        ("torch", "onnxscript", "coremltools", "litert-torch", "coreai-torch", "onnxruntime-qnn", "transformers"),
        ("network", "ours", "ours, --jobs 1", "theirs", "theirs, each", "ours / theirs", "peak memory, ours / theirs"),
        [row(name, rounds) for name, rounds in found.items()],
        before="Wall clock of processes from an empty cache, the median of "
        f"{len(next(iter(found.values())))} rounds (least to most), all interleaved; at most {WANTED} of the makers' time is "
        "wanted. Ours: load, compression to what `balanced` has, five artifacts, weights read back, all answers compared, "
        "sizes, timing, bundle. Theirs: torch.onnx.export, coremltools, litert-torch, coreai-torch, and torch.onnx.export "
        "with onnxruntime's QNN compiler in float16, each in a process, one after the other; nothing is compressed or "
        "checked. Memory: the most that a process and its children hold at once, pages that they share counted once; of "
        "theirs the largest of the five. "
        f"Load of the machine before each round: {min(loads):.1f} to {max(loads):.1f}.",
    )


if __name__ == "__main__":
    main()
