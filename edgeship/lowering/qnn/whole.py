"""The ONNX graph in the form that Hexagon takes whole, in one file."""

from __future__ import annotations

from pathlib import Path

from edgeship.lowering.qnn.blocks import split_block_scales
from edgeship.lowering.qnn.embedding import lookup_integers
from edgeship.lowering.qnn.graph import Graph
from edgeship.lowering.qnn.logs import floor_behind_logs
from edgeship.lowering.qnn.matmul import keep_products_wide
from edgeship.lowering.qnn.means import divide_before_sums
from edgeship.lowering.qnn.norms import quantize_norms
from edgeship.lowering.qnn.sigmoid import spell_out_sigmoids
from edgeship.lowering.qnn.tanh import keep_tanh_apart


def rewrite_graph(source: Path, written: Path, htp_arch: int) -> None:
    """Read ``source``, with its external data if it has any, and write it for Hexagon.

    Raises `EncodingError` when a weight cannot be held exactly.
    """
    import onnx

    model = onnx.load(source)
    graph = Graph(model)
    lookup_integers(graph)
    split_block_scales(graph)
    quantize_norms(graph)
    keep_products_wide(graph, htp_arch)
    keep_tanh_apart(graph)
    spell_out_sigmoids(graph)
    divide_before_sums(graph)
    floor_behind_logs(graph)
    graph.finish()
    onnx.save(model, written)
