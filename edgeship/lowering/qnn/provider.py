"""ONNX Runtime sessions on the QNN provider. Only the child process loads Qualcomm's library, through this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROVIDER = "QNNExecutionProvider"
ERRORS_ONLY = 3


@dataclass(frozen=True)
class Hexagon:
    """What the compiler must know of the chip.

    Args:
        soc_model: Qualcomm's number of the chip (57 is SM8650). htp_arch: version of its Hexagon (75).
        float16: compute float32 graphs in float16; graphs with integer pairs need it not.
    """

    soc_model: int
    htp_arch: int
    float16: bool = False


def provider_options(chip: Hexagon) -> dict[str, str]:
    """Provider options, all as strings.

    ``enable_block_quant_weight_optimization`` stays off: it quantizes block-wise weights again.
    """
    import onnxruntime_qnn

    options = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": str(chip.soc_model),
        "htp_arch": str(chip.htp_arch),
        "offload_graph_io_quantization": "0",
        "htp_graph_finalization_optimization_mode": "3",
    }
    return {**options, "enable_htp_fp16_precision": "1"} if chip.float16 else options


def open_session(model: str, options: dict[str, str], entries: dict[str, str]) -> Any:
    """An inference session of ``model`` on the HTP, with session configuration ``entries``."""
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = ERRORS_ONLY
    for key, value in entries.items():
        session_options.add_session_config_entry(key, value)
    session_options.add_provider_for_devices(devices, options)
    return onnxruntime.InferenceSession(model, session_options)
