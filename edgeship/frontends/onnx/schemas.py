"""What the onnx package itself knows of an operator: its definition as a function, or why there is none here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto

from edgeship.errors import UnsupportedOpError
from edgeship.frontends.onnx.dtypes import ELEM_TYPE
from edgeship.frontends.onnx.values import Value

_OUTSIDE = "keep that part outside the exported graph"

#: Operators that are declined on purpose, with the reason.
_DECLINED: dict[str, str] = {
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        "random numbers differ from run to run, so no artifact could be verified",
    ),
    **dict.fromkeys(
        ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"),
        "preparing text belongs to the app",
    ),
    **dict.fromkeys(("Optional", "OptionalGetElement", "OptionalHasElement"), "optional types are not imported"),
    "ImageDecoder": "decoding image files belongs to the app",
    "NonMaxSuppression": "the number of boxes it keeps depends on the data",
}


@dataclass(frozen=True)
class FunctionBody:
    """An operator written out in simpler operators, and the attributes that its body refers to."""

    function: FunctionProto
    attributes: Mapping[str, AttributeProto]


def refusal(domain: str, op_type: str, opset: int, where: str) -> UnsupportedOpError:
    """The error for an operator that is neither imported nor defined through others."""
    if domain == "" and op_type in _DECLINED:
        return UnsupportedOpError(f"{where}: {_DECLINED[op_type]}", fix=_OUTSIDE)
    if domain == "ai.onnx.ml":
        return UnsupportedOpError(f"{where}: classical machine learning operators are not imported", fix=_OUTSIDE)
    if "training" in domain:
        return UnsupportedOpError(f"{where}: training operators are not imported", fix="export the inference graph")
    if domain == "" and not onnx.defs.has(op_type, opset, domain):
        return UnsupportedOpError(f"{where}: opset {opset} has no such operator", fix="check its opset_import")
    return UnsupportedOpError(f"{where}: this operator is not imported", fix=f"replace it in the model, or {_OUTSIDE}")


def function_body(
    node: NodeProto,
    domain: str,
    opset: int,
    inputs: Sequence[Value],
    attributes: Mapping[str, AttributeProto],
    elem_types: Mapping[torch.Tensor, int],
) -> FunctionBody | None:
    """The definition that the ONNX specification gives for ``node`` in terms of other operators, if it does."""
    if domain == "" and node.op_type in _DECLINED:
        return None
    if not onnx.defs.has(node.op_type, opset, domain):
        return None
    schema = onnx.defs.get_schema(node.op_type, opset, domain)
    defaults = {
        name: attribute.default_value
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name and name not in attributes
    }
    settled = {**attributes, **defaults}
    serialized = _serialized_function(schema, opset, node, inputs, settled, elem_types)
    if serialized is None:
        return None
    function = FunctionProto()
    function.ParseFromString(serialized)
    return FunctionBody(function, settled)


def _serialized_function(
    schema: onnx.defs.OpSchema,
    opset: int,
    node: NodeProto,
    inputs: Sequence[Value],
    attributes: Mapping[str, AttributeProto],
    elem_types: Mapping[torch.Tensor, int],
) -> bytes | None:
    plain = max((version for version in schema.function_opset_versions if version <= opset), default=None)
    if plain is not None:
        return bytes(schema.get_function_with_opset_version(plain))
    dependent = [version for version in schema.context_dependent_function_opset_versions if version <= opset]
    if not dependent:
        return None
    bound = NodeProto()
    bound.CopyFrom(node)
    del bound.attribute[:]
    bound.attribute.extend(attributes.values())
    types = [_type_proto(value, elem_types).SerializeToString() for value in inputs]
    version = max(dependent)
    return bytes(schema.get_context_dependent_function_with_opset_version(version, bound.SerializeToString(), types))


def _type_proto(value: Value, elem_types: Mapping[torch.Tensor, int]) -> TypeProto:
    """Type and shape of a tensor; nothing for a sequence."""
    if not isinstance(value, torch.Tensor):
        return TypeProto()
    elem_type = elem_types.get(value, ELEM_TYPE[value.dtype])
    return onnx.helper.make_tensor_type_proto(elem_type, list(value.shape))
