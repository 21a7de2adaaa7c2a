"""Run coremltools on a rewritten program: our storage pass first, and without passes that change decided numbers."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, Literal

import coremltools as ct
import numpy as np
import torch

from edgeship.compat.coremltools import exact_conversion
from edgeship.core.weights import AffineTensor
from edgeship.errors import EdgeshipError, EncodingError, LoweringError, UnsupportedOpError
from edgeship.lowering.coreml.rewrites import in_coreml_operators
from edgeship.lowering.coreml.store import PASS, order
from edgeship.lowering.grids import quantized, quantizers
from edgeship.lowering.operators import separate_outputs, with_short_sorts
from edgeship.program.activations import insert_pairs
from edgeship.program.hollow import fit_scalars, hollow
from edgeship.program.inventory import weight_nodes
from edgeship.program.provenance import where
from edgeship.program.wide import wide_nodes

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgeship.core.inventory import WeightUse
    from edgeship.core.model import Signature
    from edgeship.core.weights import Affine
    from edgeship.program.program import TorchProgram

Compute = Literal["float16", "float32"]

# Both keep the values and change the numbers: zero point -128 becomes uint8 with 0, and the scales of sums are moved.
RENUMBERING = {
    "common::nullify_redundant_quantization_zero_point",
    "common::distributive_quantized_binary_op_scale_normalization",
}
# Fold constants into weights that were decided, or take a number for another that is near: 1.0 / 255 for a division by
# 255, a sum times 0.13 for a mean of 8, GELU's constants to three digits; `x - linear(y)` loses its sign.
RECOMPUTING = {
    "common::divide_to_multiply",
    "common::fuse_conv_batchnorm",
    "common::fuse_conv_bias",
    "common::fuse_conv_scale",
    "common::fuse_elementwise_to_batchnorm",
    "common::fuse_gelu_exact",
    "common::fuse_gelu_tanh_approximation",
    "common::fuse_linear_bias",
    "common::fuse_matmul_weight_bias",
    "common::fuse_reduce_mean",
}
# Two activations that are computed alike would become one, and the other's grid could not be read back.
MERGING = {"common::remove_redundant_ops"}


def convert(program: TorchProgram, target: str, compute: Compute) -> tuple[Any, dict[str, str]]:
    """An ``MLModel`` that is not loaded, and the constant's name for each encoded weight.

    Args:
        target: a coremltools deployment target, ``iOS16`` to ``iOS26``.
        compute: arithmetic of the program.

    Raises:
        UnsupportedOpError: an operator has no lowering. LoweringError: a weight was lost.
        EncodingError: the target has no form for an encoding.
    """
    half = compute == "float16"
    exported = with_short_sorts(hollow(program, torch.float32, for_float16=half, keep_floats=True))
    if program.activations:
        _check_activations(program, compute, target)
        exported = insert_pairs(exported, program.activations)
    activations = quantized(exported.graph)
    exported = in_coreml_operators(exported)
    grids = quantizers(exported.graph, activations, "Core ML")
    separate_outputs(exported)
    if half:
        fit_scalars(exported.graph)
    wide = wide_nodes(exported.graph) if half else {}
    for number, node in enumerate(wide):
        node.meta["debug_handle"] = number + 1
    names = {node.name: program.record.aliases.get(name, name) for name, node in weight_nodes(exported).items()}
    what = order(program.encoded, names, int(target.removeprefix("iOS")))
    what.in_fours = _in_fours(program)
    # The front end names dequantize operations after the graph's nodes, and quantize operations not at all.
    what.grids = {user.name: activation for activation, node in grids.items() for user in node.users}
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.insert_pass(0, PASS)
    pipeline.set_options(PASS, {"order": what})
    pipeline.remove_passes(RENUMBERING | RECOMPUTING | (MERGING if grids else set()))
    try:
        with exact_conversion():
            converted = ct.convert(
                exported,
                convert_to="mlprogram",
                inputs=_inputs(program.signature),
                outputs=[_tensor(spec.name, None, spec.dtype) for spec in program.signature.outputs],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=_precision(bool(wide)) if half else ct.precision.FLOAT32,
                compute_units=ct.ComputeUnit.CPU_ONLY,
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
    except EdgeshipError:
        raise
    except Exception as error:
        raise explained(error, exported) from error
    if what.waiting:
        weight, _ = next(iter(what.waiting.values()))
        raise LoweringError(
            f"Core ML's converter did not keep the weight {weight}", fix="keep it in float, or report it"
        )
    return converted, {weight: constant for constant, weight in names.items() if weight in program.encoded}


def _precision(has_wide: bool) -> Any:
    """Float16, but for operators that carry the number of a node to compute in float32."""
    if not has_wide:
        return ct.precision.FLOAT16
    from edgeship.compat.coremltools import debug_handles

    def narrow(operation: Any) -> bool:
        return all(handle is None for handle in debug_handles(operation))

    return ct.transform.FP16ComputePrecision(op_selector=narrow)


def _in_fours(program: TorchProgram) -> frozenset[str]:
    """Weights of few numbers a scale: before iOS 26 a list of integers for each scale takes more than it saves."""
    return frozenset(
        use.name
        for use in program.record.inventory.weights
        if isinstance(tensor := program.encoded.get(use.name), AffineTensor)
        and (tensor.encoding.granularity == "group" or _is_depthwise(use, tensor.encoding))
    )


def _is_depthwise(use: WeightUse, encoding: Affine) -> bool:
    return use.op == "depthwise_conv" and encoding.granularity == "channel"


def _inputs(signature: Signature) -> list[Any]:
    scalar = next((spec for spec in signature.inputs if not spec.shape), None)
    if scalar is not None:
        raise LoweringError(
            f"Core ML takes no input without a dimension ({scalar})",
            fix=f"give {scalar.name} the shape [1], or, of an ONNX file, fix it with --input {scalar.name}=VALUE",
        )
    return [_tensor(spec.name, spec.shape, spec.dtype) for spec in signature.inputs]


def _tensor(name: str, shape: tuple[int, ...] | None, dtype: str) -> Any:
    # Core ML's border has float16, float32 and int32.
    kind = {"f32": np.float32, "f16": np.float16}.get(dtype, np.int32)
    return ct.TensorType(name=name, shape=shape, dtype=kind)


def _check_activations(program: TorchProgram, compute: Compute, target: str) -> None:
    if target == "iOS16":
        raise EncodingError(
            "Core ML of iOS 16 has no quantized activations",
            fix="use float activations, or --set lower/torch_to_coreml.target=iOS17",
        )
    for node, encoding in program.activations.items():
        if encoding.bits != 8:
            raise EncodingError(
                f"Core ML quantizes activations to int8 only, not int{encoding.bits} ({node})",
                fix="use float activations",
            )
        if compute == "float16" and float(np.float16(encoding.scale)) != float(np.float32(encoding.scale)):
            raise EncodingError(f"the activation scale {encoding.scale} of {node} is not a float16 number")


def explained(error: Exception, exported: ExportedProgram) -> EdgeshipError:
    """The operator that coremltools was at, found in the frames of its error."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name != "convert_single_node":
            continue
        name = frame.f_locals["node"].name
        node = next((item for item in exported.graph.nodes if item.name == name), None)
        if node is not None:
            return UnsupportedOpError(
                f"Core ML's converter cannot lower {node.target} at {where(node)}: {message}",
                fix="rewrite that layer, or leave Core ML out with --runtime",
            )
    return LoweringError(f"Core ML's converter failed: {message}", fix="try another runtime, or report the model")
