"""What Qualcomm's compiler is given: weights read back from the calls that QNN's own Saver records.

The context binary is opaque. The Saver backend takes the same calls as the HTP backend and writes them as C source,
with every tensor's bytes in ``params.bin``: the proof that the integers which go into the binary are the decided ones.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Artifact
from edgeship.core.weights import Affine, AffineTensor
from edgeship.errors import ArtifactError
from edgeship.runtimes.qnn.emulator import last_line, worker_command, worker_environment
from edgeship.runtimes.qnn.runtime import GRAPH, chip_of, graph_of
from edgeship.runtimes.qnn.stored import read_graph_weights

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

TIMEOUT_S = 600
_DIMENSIONS = re.compile(r"uint32_t (\w+)_dims\[\] = \{([\d, ]*)\};")
_AXIS_SCALES = re.compile(r"(\w+)_quantizeParams_\w*?[sS]cale(?:Offset)?s\[\] = \{(.*)\};")
_SCALE = re.compile(
    r"Qnn_QuantizeParams_t (\w+)_quantizeParams = .*"
    r"\.(?:scaleOffsetEncoding = \{|bwScaleOffsetEncoding = \{\d+, )([^,]+),"
)
_DATA = re.compile(r"fread\((\w+)_data, (\d+), (\d+), fp\);")
_NAME = re.compile(r'Qnn_TensorV\d_t (\w+)_v\d = \{\w+, "([^"]+)"')
_NUMBER = re.compile(r"\{?\s*([-+.\deE]+)")


@dataclass(frozen=True)
class SavedTensor:
    """One constant of the compiler's graph: bytes as int8, in QNN's layout, and its scales."""

    values: Array
    scales: Array


def read_compiled_weights(artifact: Artifact) -> dict[str, AffineTensor]:
    """Every integer weight as the compiler gets it, by torch name, in the torch weight's own layout.

    Raises:
        ArtifactError: the Saver failed, or a weight is not among its tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        copyfile(artifact.path / GRAPH, Path(folder, GRAPH))
        done = subprocess.run(
            worker_command("save", {"model": GRAPH, "chip": chip_of(artifact)}),
            cwd=folder,
            env=worker_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        source = Path(folder, "saver_output", "saver_output.c")
        if not source.is_file():
            reason = last_line(done.stderr.decode(errors="replace"))
            raise ArtifactError(f"QNN's Saver wrote nothing for {artifact.path}: {reason}", fix="build again")
        saved = parse_saver(source.read_text(), source.with_name("params.bin").read_bytes())
    found: dict[str, AffineTensor] = {}
    like = read_graph_weights(graph_of(artifact))
    for placement in artifact.placements:
        known = like[placement.weight]
        if isinstance(known, AffineTensor):
            if placement.stored not in saved:
                raise ArtifactError(f"the compiler is not given {placement.weight}", fix="build again")
            found[placement.weight] = _in_torch_layout(saved, placement.stored, known)
    return found


def parse_saver(source: str, parameters: bytes) -> dict[str, SavedTensor]:
    """The 8-bit constants in the Saver's C source, by name; their bytes come in the order of the source."""
    import numpy as np

    shapes: dict[str, tuple[int, ...]] = {}
    for entry in _DIMENSIONS.finditer(source):
        shapes[entry[1]] = tuple(int(size) for size in entry[2].split(","))
    scales: dict[str, Array] = {}
    for line in source.splitlines():
        if match := _AXIS_SCALES.search(line):
            entries = re.findall(r"\{([^{}]*)\}", match[2]) or match[2].split(",")
            numbers = [float(hit[1]) for entry in entries if (hit := _NUMBER.match(entry))]
            scales.setdefault(match[1], np.array(numbers, np.float32))
        elif match := _SCALE.search(line):
            scales.setdefault(match[1], np.array([float(match[2])], np.float32))
    names = {match[1]: match[2] for match in _NAME.finditer(source)}
    found: dict[str, SavedTensor] = {}
    position = 0
    for match in _DATA.finditer(source):
        variable, itemsize, count = match[1], int(match[2]), int(match[3])
        size = itemsize * count
        if variable in names and variable in shapes:
            kind = {1: np.int8, 2: np.uint16, 4: np.int32}.get(itemsize)
            if kind is not None and count == int(np.prod(shapes[variable])):
                values = np.frombuffer(parameters, kind, count, position).reshape(shapes[variable])
                found[names[variable]] = SavedTensor(values, scales.get(variable, np.ones(1, np.float32)))
        position += size
    return found


def _in_torch_layout(saved: dict[str, SavedTensor], name: str, like: AffineTensor) -> AffineTensor:
    """QNN's HWIO kernels and row-major matrices as torch has them; ``like`` says shape, bits and channel axis."""
    import numpy as np

    tensor = saved[name]
    values, shape = tensor.values, like.shape
    axis = next((axis for axis, size in enumerate(like.scale.shape) if size > 1), 0)
    if values.ndim == 4:
        values = values.transpose((2, 3, 0, 1) if axis == 1 else (3, 2, 0, 1))
    elif values.shape != shape and values.ndim == 2:
        values = values.T
    if values.size != int(np.prod(shape)):
        raise ArtifactError(f"the compiler is given {name} in shape {tensor.values.shape}", fix="build again")
    values = np.ascontiguousarray(values).reshape(shape)
    if like.encoding.bits < 8:
        # Short integers come one a byte, in its low bits.
        values = ((values.astype(np.int16) & 15) ^ 8) - 8
    scales = tensor.scales
    multiples = saved.get(f"{name}_lookup_multiples")
    if multiples is not None:
        scales = multiples.values.astype(np.float32).reshape(-1) * multiples.scales
    return AffineTensor(values.astype(np.int8), scales.reshape(like.scale.shape), None, _encoding(like))


def _encoding(like: AffineTensor) -> Affine:
    return Affine(like.encoding.bits, True, like.encoding.granularity, like.encoding.group_size)
