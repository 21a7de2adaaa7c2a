"""CIFAR-10 ResNets in 8 and 4 bits: accuracy of every artifact beside three other quantizers on the same images.

    python benchmarks/cifar.py [--model resnet20] [--images 2000] [--only ours|others]

Calibrated on 500 images set aside; ONNX Runtime's ``quantize_static``, ai-edge-quantizer and coremltools' weight quantizers
take our own float artifacts of the same model. Every figure is taken on the saved artifact. Emulated runtimes are slow and
see some of the images, spread evenly, with the float model's accuracy on the same ones beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from builds import build
from models import cifar_files, cifar_source
from results import write_page

HERE = Path(__file__).resolve().parent
DEPTHS = {"resnet20": 20, "resnet56": 56}
# Images that an engine sees at most: evaluators and the emulator take up to a second a run.
LIMITS = {"onnx": 10_000, "tflite": 10_000, "coreml": 500, "coreai": 500, "qnn": 200}
WANTED = {"W8A8": 0.003, "W4 per channel": 0.010}

Row = tuple[str, str, str, str, float, float, int]


def ours(model: str, source: list[str], images: int) -> Iterator[Row]:
    """(model, encoding, runtime, tool, accuracy, float accuracy on the same images, bytes) of each of our artifacts."""
    for encoding, profile in (("W8A8", "w8a8"), ("W4 per channel", "w4")):
        for runtime, limit in LIMITS.items():
            options = ["--profile", str(HERE / "profiles" / f"{profile}.toml"), "--max-drop", "100%"]
            options += ["--set", f"check/accuracy.limit={min(limit, images)}"]
            built = build(source, runtime, options)
            if "accuracy" not in built.figures:
                raise SystemExit(f"{model} {encoding} {runtime}: {built.error}")
            found = built.figures
            yield model, encoding, runtime, "edgeship", found["accuracy"], found["accuracy_original"], built.bytes


def others(
    model: str, source: list[str], folder: Path, images: int, runtimes: Collection[str] = ("onnx", "tflite", "coreml")
) -> Iterator[Row]:
    """The same for the other tools, each on our float artifact for its runtime and on the images that ours saw."""
    from edgeship.core.model import Signature, TensorSpec
    from edgeship.data.batches import load_samples

    calibration = np.load(folder / "calibration.npz")["image"]
    signature = Signature((TensorSpec("image", "f32", (1, 3, 32, 32)),), ())
    for runtime, make in (("onnx", onnxruntime_static), ("tflite", ai_edge_quantizer), ("coreml", coremltools)):
        if runtime not in runtimes:
            continue
        bundle = folder / f"{model}-{runtime}"
        options = ["--profile", "exact", "--max-drop", "100%", "--set", "check/accuracy.limit=100"]
        if runtime != "coreml":
            options += ["--set", "compress/quantize.form=float32"]
        built = build(source, runtime, options, keep=bundle)
        if built.error:
            raise SystemExit(f"float {runtime}: {built.error}")
        samples = load_samples(str(folder / "eval.npz"), signature, min(LIMITS[runtime], images))
        pixels, labels = np.concatenate([item["image"] for item in samples.inputs]), samples.labels
        assert labels is not None
        float_accuracy = _accuracy(_float_runner(runtime, bundle), pixels, labels)
        for encoding, tool, run, size in make(bundle, folder, calibration):
            yield model, encoding, runtime, tool, _accuracy(run, pixels, labels), float_accuracy, size


Runner = Callable[[np.ndarray], np.ndarray]


def _accuracy(run: Runner, pixels: np.ndarray, labels: np.ndarray) -> float:
    hits = sum(int(run(image[None]).reshape(-1).argmax() == label) for image, label in zip(pixels, labels, strict=True))
    return hits / len(labels)


def _float_runner(runtime: str, bundle: Path) -> Runner:
    if runtime == "onnx":
        return _onnx(bundle / "onnx" / "model.onnx")
    if runtime == "tflite":
        return _litert(next((bundle / "tflite").glob("*.tflite")))
    return _coreml(bundle / "coreml" / "model.mlpackage")


def _onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda image: np.asarray(session.run(None, {session.get_inputs()[0].name: image})[0])


def _litert(path: Path) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=2)
    interpreter.allocate_tensors()
    given, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(image: np.ndarray) -> np.ndarray:
        value = image.reshape(given["shape"])
        if given["dtype"] == np.int8:
            scale, zero = given["quantization"]
            value = np.clip(np.round(value / scale) + zero, -128, 127)
        interpreter.set_tensor(given["index"], value.astype(given["dtype"]))
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(answer["index"]))

    return run


def _coreml(path: Path) -> Runner:
    from edgeship.runtimes.coreml.evaluator import Evaluator

    evaluator = Evaluator(path)
    name, output = evaluator.inputs[0].name, evaluator.outputs[0].name
    return lambda image: np.asarray(evaluator.run({name: image})[output])


def onnxruntime_static(bundle: Path, folder: Path, calibration: np.ndarray) -> Iterator[tuple[str, str, Runner, int]]:
    """``quantize_static``, QDQ, per channel, its default calibration (min-max)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    source = bundle / "onnx" / "model.onnx"
    name = _input_name(source)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {name: image[None]}

    place = folder / "quantize_static.onnx"
    quantize_static(
        source, place, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8
    )
    yield "W8A8", "ONNX Runtime quantize_static", _onnx(place), place.stat().st_size


def _input_name(path: Path) -> str:
    import onnxruntime

    return str(onnxruntime.InferenceSession(path).get_inputs()[0].name)


def ai_edge_quantizer(bundle: Path, folder: Path, calibration: np.ndarray) -> Iterator[tuple[str, str, Runner, int]]:
    """Static 8 bits by its own calibration (min-max), and 4-bit weights per channel with dynamic activations."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import qtyping, quantizer, recipe

    source = next((bundle / "tflite").glob("*.tflite"))
    interpreter = Interpreter(str(source))
    (key, signature), *_ = interpreter.get_signature_list().items()
    name = signature["inputs"][0]
    shape = interpreter.get_signature_runner(key).get_input_details()[name]["shape"]
    tool = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
    samples = {key: [{name: image[None].reshape(shape)} for image in calibration]}
    place = folder / "static.tflite"
    tool.quantize(tool.calibrate(samples)).export_model(str(place), overwrite=True)
    yield "W8A8", "ai-edge-quantizer static", _litert(place), place.stat().st_size
    tool = quantizer.Quantizer(str(source))
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=4, symmetric=True, granularity=qtyping.QuantGranularity.CHANNELWISE
        ),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    for operation in (qtyping.TFLOperationName.FULLY_CONNECTED, qtyping.TFLOperationName.CONV_2D):
        tool.update_quantization_recipe(
            regex=".*", operation_name=operation, op_config=config, algorithm_key="min_max_uniform_quantize"
        )
    place = folder / "w4.tflite"
    tool.quantize().export_model(str(place), overwrite=True)
    yield "W4 per channel", "ai-edge-quantizer weight-only", _litert(place), place.stat().st_size


def coremltools(bundle: Path, folder: Path, calibration: np.ndarray) -> Iterator[tuple[str, str, Runner, int]]:
    """Its weight quantizers; it quantizes activations on macOS only."""
    import coremltools as ct
    import coremltools.optimize as cto

    model = ct.models.MLModel(str(bundle / "coreml" / "model.mlpackage"), skip_model_load=True)
    for label, dtype in (("W8 per channel", "int8"), ("W4 per channel", "int4")):
        config = cto.coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=dtype, granularity="per_channel", weight_threshold=0
        )
        made = cto.coreml.linear_quantize_weights(model, cto.coreml.OptimizationConfig(global_config=config))
        place = folder / f"{dtype}.mlpackage"
        made.save(str(place))
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        yield label, "coremltools linear_quantize_weights", _coreml(place), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(DEPTHS))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", choices=["ours", "others"])
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        calibration, evaluation = cifar_files(folder, evaluation=given.images)
        for model, depth in DEPTHS.items():
            if given.model not in (None, model):
                continue
            source = cifar_source(depth, calibration, evaluation)
            for part, make in (("ours", ours), ("others", others)):
                if given.only in (None, part):
                    arguments = (
                        (model, source, given.images) if part == "ours" else (model, source, folder, given.images)
                    )
                    for row in make(*arguments):  # type: ignore[operator]
                        print(row, flush=True)
                        rows.append(row)
    order = {key: place for place, key in enumerate(WANTED)}
    rows.sort(key=lambda row: (row[0], order.get(row[1], 9), list(LIMITS).index(row[2]), row[3] != "edgeship"))
    table = []
    for model, encoding, runtime, tool, accuracy, original, size in rows:
        lost, wanted = original - accuracy, WANTED.get(encoding)
        met = "" if tool != "edgeship" or wanted is None else ("met" if lost <= wanted + 1e-9 else "missed")
        table.append(
            [
                model,
                encoding,
                runtime,
                tool,
                f"{accuracy:.2%}",
                f"{original:.2%}",
                f"{100 * lost:+.2f}",
                met,
                f"{size / 1e3:.1f} kB",
            ]
        )
    write_page(
        "cifar", "CIFAR-10 ResNets in 8 and 4 bits", "python benchmarks/cifar.py",
        ("edgeship", "torch", "onnxruntime", "coremltools", "ai-edge-quantizer", "ai-edge-litert", "onnxruntime-qnn"),
        ("model", "encoding", "runtime", "tool", "accuracy", "float, same images", "points lost", "wanted", "file"),
        table,
        before=f"{given.images} images (Core ML and Core AI 500 of them, the HTP emulator 200), none of which calibration "
        "saw. Wanted: W8A8 at most 0.3 point, W4 per channel at most 1.0. On QNN, W4 runs with 16-bit activations. A file "
        "of QNN holds the QDQ graph, the context binary and the DLC.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
