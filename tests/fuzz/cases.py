"""Bad inputs, drawn from a seed: `KINDS` names the makers. Each writes files into its place and returns a command."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import pickle
import random
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Maker, Place
from hostile import IDLE, PICKLES, PT2, changed_pt2, good_pt2

TARGET = ("--target", "linux-x86", "--runtime", "onnx")
# Whole numbers and texts that nobody expects.
NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), 10**9, 10**18,
]  # fmt: skip
FLOATS: list[float] = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 0.5]
TEXTS = [
    "", " ", "x", "0", "..", "/etc/passwd", "../../x", "a" * 300, "\u0000", "é", "'; touch canary; '", "{x}", "%s",
    "__import__('os').system('touch ../canary')", "nan", "inf", "-1", "1e400", "9" * 400, "NULL", "\n", "a:b", "[",
]  # fmt: skip
ODD_VALUES: list[Any] = [*NUMBERS, *FLOATS, *TEXTS, None, True, [], {}, [[]], [0] * 100, {"a": {}}, 10**400]
CODE = "import torch\n\n\ndef model():\n    torch.manual_seed(0)\n    return torch.nn.Linear(4, 3)\n"
BUILD = ("build", "-o", "out", *TARGET)
PLAN = ("plan", *TARGET)


def command(place: Place, *rest: object) -> list[object]:
    """``build`` for a third, ``plan`` and ``--dry-run`` for the others."""
    first = place.random.choice([BUILD, PLAN, (*BUILD, "--dry-run")])
    return [*first, *rest]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, repeated or put in."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice([0, 255, 127, 128])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 40)]
            case 4:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
            case 5:
                size = min(rng.choice([1, 2, 4, 8]), len(data) - at)
                data[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(data)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the leaves and containers of plain data lie."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def mutated(value: Any, rng: random.Random, times: int = 1) -> Any:
    """Plain data with leaves replaced, dropped, or doubled."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places = list(leaves(value))
        if not places:
            return value
        *path, last = rng.choice(places)
        holder = functools.reduce(lambda item, key: item[key], path, value)
        match rng.randrange(5):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[last]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = holder.pop(last)
            case _:
                holder[last] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


# --- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_bases() -> list[Any]:
    """Small models with what files have: products, convolutions, tables, branches, loops, functions, states."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    def ints(name: str, *values: int) -> Any:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    def info(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    node = helper.make_node
    dense = helper.make_graph(
        [node("Gemm", ["x", "w", "b"], ["h"], transB=1), node("Relu", ["h"], ["r"]),
         node("Reshape", ["r", "s"], ["v"]), node("Softmax", ["v"], ["y"], axis=-1)],
        "dense", [info("x", [1, 4])], [info("y", None)], [weight("w", 6, 4), weight("b", 6), ints("s", 1, 2, 3)],
    )  # fmt: skip
    image = helper.make_graph(
        [node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1], group=1),
         node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
         node("Resize", ["p", "", "k"], ["u"], mode="nearest"), node("Pad", ["u", "a"], ["d"]),
         node("ReduceMean", ["d", "axes"], ["y"], keepdims=0)],
        "image", [info("x", [1, 3, 8, 8])], [info("y", None)],
        [weight("w", 4, 3, 3, 3), numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "k"),
         ints("a", 0, 0, 1, 1, 0, 0, 1, 1), ints("axes", 2, 3)],
    )  # fmt: skip
    shapes = helper.make_graph(
        [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["z"]), node("Add", ["x", "z"], ["a"]),
         node("Expand", ["a", "e"], ["b"]), node("Tile", ["b", "t"], ["c"]), node("Range", ["r0", "r1", "r2"], ["r"]),
         node("Cast", ["r"], ["f"], to=1), node("Add", ["c", "f"], ["d"]), node("Slice", ["d", "b0", "b1"], ["g"]),
         node("Gather", ["g", "i"], ["o"], axis=1), node("Mod", ["i", "m"], ["q"]), node("Div", ["q", "m"], ["q2"]),
         node("Cast", ["q2"], ["q3"], to=1), node("Mul", ["o", "q3"], ["y"])],
        "shapes", [info("x", [1, 4])], [info("y", None)],
        [ints("e", 2, 4), ints("t", 1, 1), ints("b0", 0, 0), ints("b1", 2, 4), ints("i", 0, 3, 1, 2),
         numpy_helper.from_array(np.int64(0), "r0"), numpy_helper.from_array(np.int64(4), "r1"),
         numpy_helper.from_array(np.int64(1), "r2"), ints("m", 2)],
    )  # fmt: skip
    body = helper.make_graph(
        [node("Add", ["v", "one"], ["v2"]), node("Identity", ["cond"], ["cond2"])], "body",
        [info("n", [], TensorProto.INT64), info("cond", [], TensorProto.BOOL), info("v", [1, 4])],
        [info("cond2", [], TensorProto.BOOL), info("v2", [1, 4])], [weight("one", 1, 4)],
    )  # fmt: skip
    branch = helper.make_graph([node("Neg", ["x"], ["b"])], "then", [], [info("b", None)])
    other = helper.make_graph([node("Abs", ["x"], ["b"])], "else", [], [info("b", None)])
    control = helper.make_graph(
        [node("Loop", ["m", "c", "x"], ["l"], body=body),
         node("If", ["c"], ["i"], then_branch=branch, else_branch=other), node("Add", ["l", "i"], ["y"])],
        "control", [info("x", [1, 4])], [info("y", None)],
        [numpy_helper.from_array(np.int64(3), "m"), numpy_helper.from_array(np.bool_(True), "c")],
    )  # fmt: skip
    state = helper.make_graph(
        [node("LSTM", ["x", "w", "r", "b"], ["h", "hn", "cn"], hidden_size=3), node("Squeeze", ["h", "ax"], ["q"]),
         node("Einsum", ["q", "q"], ["y"], equation="tbh,tbk->hk")],
        "state", [info("x", [5, 1, 4])], [info("y", None)],
        [weight("w", 1, 12, 4), weight("r", 1, 12, 3), weight("b", 1, 24), ints("ax", 1)],
    )  # fmt: skip
    made = [
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        for graph in (dense, image, shapes, control, state)
    ]
    double = [node("Add", ["a", "a"], ["b"])]
    function = helper.make_function("my", "Double", ["a"], ["b"], double, [helper.make_opsetid("", 18)])
    caller = helper.make_graph([node("Double", ["x"], ["y"], domain="my")], "f", [info("x", [1, 4])], [info("y", None)])
    made.append(
        helper.make_model(
            caller, functions=[function], ir_version=9,
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("my", 1)],
        )
    )  # fmt: skip
    return made


def _mutate_message(message: Any, rng: random.Random) -> None:
    """Change one field somewhere in a protobuf message."""
    set_fields = list(message.ListFields())
    if not set_fields:
        return
    field, value = rng.choice(set_fields)
    repeated = hasattr(value, "append") or hasattr(value, "add")
    if field.message_type is not None:
        inner = list(value) if repeated else [value]
        if inner and rng.random() < 0.8:
            _mutate_message(rng.choice(inner), rng)
        elif repeated and inner:
            if rng.random() < 0.5:
                del value[rng.randrange(len(inner))]
            else:
                value.add().CopyFrom(rng.choice(inner))
        return
    new = _odd_for(field, rng)
    try:
        if not repeated:
            setattr(message, field.name, new)
        elif rng.random() < 0.3:
            value.append(new)
        else:
            value[rng.randrange(len(value))] = new
    except (ValueError, TypeError, IndexError):
        message.ClearField(field.name)


def _odd_for(field: Any, rng: random.Random) -> Any:
    kinds = {field.CPPTYPE_STRING: [*TEXTS, "Relu", "Loop", "If", "x", "y", "w"], field.CPPTYPE_FLOAT: FLOATS}
    kinds |= {field.CPPTYPE_DOUBLE: FLOATS}
    value = rng.choice(kinds.get(field.cpp_type, NUMBERS))
    return value.encode() if field.type == field.TYPE_BYTES and isinstance(value, str) else value


def onnx_structure(place: Place) -> list[object]:
    """A model with some fields changed, or with bytes flipped."""
    model = copy.deepcopy(place.random.choice(onnx_bases()))
    for _ in range(place.random.choice([1, 1, 2, 3, 8])):
        _mutate_message(model.graph if place.random.random() < 0.8 else model, place.random)
    content = model.SerializeToString()
    if place.random.random() < 0.15:
        content = flipped(content, place.random)
    (place.folder / "m.onnx").write_bytes(content)
    return command(place, "m.onnx")


def _onnx_graph(nodes: list[Any], initializers: list[Any], inputs: dict[str, Any], functions: list[Any] = ()) -> bytes:  # type: ignore[assignment]
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]
    made: bytes = helper.make_model(
        graph, opset_imports=opsets, functions=list(functions), ir_version=9
    ).SerializeToString()
    return made


def onnx_large(place: Path | Place) -> list[object]:
    """Shapes, loops, functions and depths that would take all memory or all day."""
    from onnx import TensorProto, helper, numpy_helper

    assert isinstance(place, Place)
    node, rng = helper.make_node, place.random
    huge = np.array([rng.choice([10**5, 2**31, 10**9]), rng.choice([10**5, 2**20])], np.int64)
    size = numpy_helper.from_array(huge, "s")
    scalar = {
        name: numpy_helper.from_array(np.int64(value), name) for name, value in (("a", 0), ("n", 10**11), ("d", 1))
    }
    to_y = [node("ReduceMax", ["h"], ["m"]), node("Add", ["x", "m"], ["y"])]
    pick = rng.randrange(12)
    functions: list[Any] = []
    shape: Any = [1, 4]
    if pick == 0:
        nodes, held = [node("ConstantOfShape", ["s"], ["h"]), *to_y], [size]
    elif pick == 1:
        nodes, held = (
            [node("Range", ["a", "n", "d"], ["r"]), node("Cast", ["r"], ["h"], to=1), *to_y],
            [*scalar.values()],
        )
    elif pick == 2:
        one = numpy_helper.from_array(np.ones((1, 1), np.float32), "o")
        nodes, held = [node("Expand", ["o", "s"], ["e"]), node("Exp", ["e"], ["h"]), *to_y], [one, size]
    elif pick == 3:
        nodes, held = [node("Tile", ["x", "s"], ["h"]), *to_y], [size]
    elif pick == 4:
        pads = numpy_helper.from_array(np.array([0, 10**9, 0, 10**9], np.int64), "p")
        nodes, held = [node("Pad", ["x", "p"], ["h"]), *to_y], [pads]
    elif pick == 5:
        nodes = [node("RandomNormal", [], ["h"], shape=huge.tolist()), *to_y]
        held = []
    elif pick == 6:
        functions = [
            helper.make_function("my", f"F{i}", ["a"], ["b"], [
                node(f"F{i - 1}" if i else "Neg", ["a"], ["t"], domain="my" if i else ""),
                node(f"F{i - 1}" if i else "Neg", ["t"], ["b"], domain="my" if i else ""),
            ], [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)])
            for i in range(30)
        ]  # fmt: skip
        nodes, held = [node("F29", ["x"], ["y"], domain="my")], []
    elif pick == 7:
        functions = [helper.make_function("my", "F", ["a"], ["b"], [node("F", ["a"], ["b"], domain="my")],
                                          [helper.make_opsetid("my", 1)])]  # fmt: skip
        nodes, held = [node("F", ["x"], ["y"], domain="my")], []
    elif pick == 8:
        layers = 100_000
        nodes = [node("Neg", [f"v{i}" if i else "x"], [f"v{i + 1}" if i + 1 < layers else "y"]) for i in range(layers)]
        held = []
    elif pick == 9:
        shape = [10**6, 10**6]
        nodes, held = [node("Neg", ["x"], ["y"])], []
    elif pick == 10:
        tensor = TensorProto(name="w", data_type=1, dims=[2**40, 2**40])
        nodes, held = [node("Add", ["x", "w"], ["y"])], [tensor]
    else:
        inner = helper.make_graph([node("Neg", ["x"], ["i0"])], "g", [], [helper.make_tensor_value_info("i0", 1, None)])
        for depth in range(1, 20):
            wrapped = [node("If", ["c"], [f"i{depth}"], then_branch=inner, else_branch=inner)] if depth < 8 else [
                node("If", ["c"], [f"i{depth}"], then_branch=inner, else_branch=_leaf(depth))
            ]  # fmt: skip
            inner = helper.make_graph(wrapped, f"g{depth}", [], [helper.make_tensor_value_info(f"i{depth}", 1, None)])
        nodes = [node("If", ["c"], ["y"], then_branch=inner, else_branch=_leaf(20))]
        held = [numpy_helper.from_array(np.bool_(True), "c")]
    (place.folder / "m.onnx").write_bytes(_onnx_graph(nodes, held, {"x": shape}, functions))
    return command(place, "m.onnx")


def _leaf(depth: int) -> Any:
    from onnx import helper

    name = f"e{depth}"
    return helper.make_graph(
        [helper.make_node("Neg", ["x"], [name])], name, [], [helper.make_tensor_value_info(name, 1, None)]
    )


# --- weights, programs, data -----------------------------------------------------------------------------------------


def _with_factory(place: Place, path: str) -> list[object]:
    (place.folder / "m.py").write_text(CODE)
    return command(place, path, "--factory", "m.py:model", "--input", "x:f32[1,4]")


def safetensors(place: Place) -> list[object]:
    """A header of other names, shapes, dtypes, places, or of another length."""
    weight, bias = np.ones((3, 4), np.float32), np.ones(3, np.float32)
    header: Any = {
        "weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "bias": {"dtype": "F32", "shape": [3], "data_offsets": [48, 60]},
    }
    text = json.dumps(mutated(header, place.random, place.random.choice([1, 1, 2, 4]))).encode()
    if place.random.random() < 0.1:
        text = b"[" * 200_000
    length = place.random.choice([len(text)] * 5 + [0, 1, 2**40, 2**63 + 1, len(text) - 1, len(text) + 1])
    content = struct.pack("<Q", length) + text + weight.tobytes() + bias.tobytes()
    (place.folder / "w.safetensors").write_bytes(
        flipped(content, place.random) if place.random.random() < 0.3 else content
    )
    return _with_factory(place, "w.safetensors")


def exported(place: Place) -> list[object]:
    """A .pt2 whose JSON is changed, whose entries are lost or flipped, or that is hostile."""
    name = f"m{place.random.choice(['.pt2', '.pt2', '.pt', '.bin'])}"
    path = place.folder / name
    if place.random.random() < 0.35:
        hostile = {**PT2, **IDLE}
        changed_pt2(path, hostile[place.random.choice(sorted(hostile))], place.canary)
        shutil.rmtree(place.folder / "__pycache__", ignore_errors=True)
        return command(place, name)

    def change(entries: dict[str, bytes], _: Path) -> None:
        for _ in range(place.random.choice([1, 1, 2])):
            entry = place.random.choice(["models/model.json"] * 4 + sorted(entries))
            if entry.endswith(".json") and entries.get(entry) and place.random.random() < 0.8:
                data = mutated(json.loads(entries[entry]), place.random, place.random.choice([1, 2, 5]))
                entries[entry] = json.dumps(data).encode()
            elif place.random.random() < 0.3:
                entries.pop(entry, None)
            else:
                entries[entry] = flipped(entries.get(entry, b""), place.random)

    changed_pt2(path, change, place.canary)
    if place.random.random() < 0.15:
        path.write_bytes(flipped(path.read_bytes(), place.random))
    return command(place, name)


def checkpoint(place: Place) -> list[object]:
    """A hostile pickle, or an honest one with bytes changed."""
    import torch

    suffix = place.random.choice([".pt", ".pth", ".bin", ".ckpt"])
    path = place.folder / f"w{suffix}"
    if place.random.random() < 0.4:
        PICKLES[place.random.choice(sorted(PICKLES))](path, place.canary)
        return _with_factory(place, path.name)
    state: Any = torch.nn.Linear(4, 3).state_dict()
    state = place.random.choice(
        [state, {"state_dict": state, "epoch": 3}, {"model": state}, [state], {"weight": 3}, {}]
    )
    if place.random.random() < 0.2:
        path.write_bytes(flipped(pickle.dumps({"weight": np.ones((3, 4), np.float32)}), place.random))
        return _with_factory(place, path.name)
    torch.save(state, path, _use_new_zipfile_serialization=place.random.random() < 0.5)
    content = path.read_bytes()
    if content.startswith(b"PK") and place.random.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = place.random.choice(sorted(entries))
        entries[name] = flipped(entries[name], place.random)
        with zipfile.ZipFile(
            path, "w", place.random.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])
        ) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    else:
        path.write_bytes(flipped(content, place.random))
    return _with_factory(place, path.name)


def npy(shape: tuple[int, ...], descr: str, content: bytes) -> bytes:
    """A .npy file that says what it is told to say."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def bomb(path: Path, gigabytes: int) -> None:
    """An npz whose one member unpacks to gigabytes of zeros."""
    head = npy((gigabytes << 20, 1, 1, 4, 64), "<f4", b"")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    start = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = start.compress(head) + start.flush(zlib.Z_FULL_FLUSH) + block * (gigabytes << 6) + b"\x03\x00"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"")
    size, name = len(head) + (gigabytes << 30), b"x.npy"
    big = struct.pack("<HHQQ", 1, 16, size, len(body))
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0, 8, 0, 0x21, 0, 2**32 - 1, 2**32 - 1, len(name), len(big))
    central = struct.pack(
        "<IHHHHHHIIIHHHHHII", 0x02014B50, 45, 45, 0, 8, 0, 0x21, 0, 2**32 - 1, 2**32 - 1, len(name), len(big), 0, 0, 0,
        0, 0,
    )  # fmt: skip
    whole = local + name + big + body
    entry = central + name + big
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(entry), len(whole), 0)
    path.write_bytes(whole + entry + end)


def data(place: Place) -> list[object]:
    """Calibration and evaluation data: bombs, other shapes and dtypes, labels of no class, flipped bytes."""
    (place.folder / "m.py").write_text(CODE)
    rng = place.random
    name = rng.choice(["d.npz", "d.npz", "d.npy", "images"])
    path = place.folder / name
    x = np.ones((4, 4), np.float32)
    if name == "images":
        from PIL import Image

        path.mkdir()
        Image.new("RGB", (3, 3)).save(path / "a.png")
        (path / "b.png").write_bytes(flipped((path / "a.png").read_bytes(), rng))
    elif name == "d.npy":
        shape = rng.choice([(4, 4), (2**40, 4), (-1, 4), (2**62, 2**62), (0, 4), ("4", 4), (4.0, 4)])
        content = npy(shape, rng.choice(["<f4", "<f8", "|O", "<i8", "<U4", "<c8", "V4", "<M8[s]"]), x.tobytes())
        path.write_bytes(flipped(content, rng) if rng.random() < 0.3 else content)
    elif rng.random() < 0.2:
        bomb(path, 9)
    else:
        arrays: dict[str, Any] = {"x": x}
        odd: list[Any] = [
            np.full((4, 4), np.nan, np.float32), np.ones((4, 5), np.float32), np.ones((4, 4), np.complex64), x[:0],
            np.float32(3), np.array(["a"] * 4), np.ones((4, 4), bool), x.astype(">f4"), x.astype(np.float64) * 1e300,
            np.ones((4, 4), np.uint64), np.ones((4, 4), np.float16), np.ones((1,) * 20, np.int8),
        ]  # fmt: skip
        labels: list[Any] = [
            np.array([0, 1, 2, 99]), np.array([-1] * 4), np.array([0.5] * 4), np.array([np.nan] * 4),
            np.array(["a"] * 4), np.ones((4, 2), int), np.array(3), np.array([2**62] * 4), np.array([], int), np.ones(4, bool),
        ]  # fmt: skip
        if rng.random() < 0.5:
            arrays["x"] = rng.choice(odd)
        if rng.random() < 0.7:
            arrays[rng.choice(["label", "labels", "target", "y", "x.npy"])] = rng.choice(labels)
        np.savez(path, **arrays)
        if rng.random() < 0.2:
            path.write_bytes(flipped(path.read_bytes(), rng))
    rest = [rng.choice(["--calibration", "--eval"]), name]
    if rng.random() < 0.5:
        rest += ["--eval", name, "--metric", rng.choice(["accuracy", "snr", "cosine", "perplexity"])]
    return command(place, "m.py:model", "--input", "x:f32[1,4]", "--profile", rng.choice(["fast", "balanced"]), *rest)


# --- folders, TOML, options, bundles ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _hugging_face() -> dict[str, bytes]:
    import tempfile

    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        bert = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=8,
        )  # fmt: skip
        llama = LlamaConfig(
            vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=8, max_position_embeddings=16,
        )  # fmt: skip
        BertModel(bert).save_pretrained(f"{folder}/bert")
        LlamaForCausalLM(llama).save_pretrained(f"{folder}/llama")
        for path in Path(folder).rglob("*"):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def folder(place: Place) -> list[object]:
    """A Hugging Face folder whose configuration or weights are changed, with links and nested folders."""
    rng = place.random
    kind = rng.choice(["bert", "llama"])
    home = place.folder / "hf"
    home.mkdir()
    for name, content in _hugging_face().items():
        if name.startswith(f"{kind}/"):
            (home / Path(name).name).write_bytes(content)
    config = json.loads((home / "config.json").read_text())
    match rng.randrange(7):
        case 0 | 1 | 2:
            config = mutated(config, rng, rng.choice([1, 1, 2]))
        case 3:
            config[rng.choice(["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"])] = rng.choice(
                [10**9, 10**6, 0, -1, 1.5, "8"]
            )
        case 4:
            weights = home / "model.safetensors"
            weights.write_bytes(flipped(weights.read_bytes(), rng))
        case 5:
            shards = {"metadata": {}, "weight_map": {"a": rng.choice(TEXTS), "b": "model.safetensors"}}
            (home / "model.safetensors.index.json").write_text(json.dumps(shards))
        case 6:
            PICKLES["a saved pickle"](home / "pytorch_model.bin", place.canary)
            (home / "model.safetensors").unlink()
    text = json.dumps(config)
    (home / "config.json").write_text("[" * 100_000 if rng.random() < 0.03 else text)
    if rng.random() < 0.1:
        (home / "loop").symlink_to(home)
    return command(place, "hf")


def toml_text(value: Any) -> str:
    """A value as TOML, or what looks like it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, (int, float)):
        return str(value)
    return json.dumps(value) if value is not None else "nothing"


def toml(place: Place) -> list[object]:
    """A sample.toml or a profile with keys changed."""
    rng = place.random
    if rng.random() < 0.6:
        home = place.folder / "sample"
        home.mkdir()
        (home / "w.onnx").write_bytes(onnx_bases()[0].SerializeToString())
        (home / "evil.py").write_text(f"open({str(place.canary)!r}, 'w')\n\n\ndef model():\n    pass\n")
        np.savez(home / "d.npz", x=np.ones((3, 4), np.float32))
        base: Any = {
            "source": "w.onnx", "inputs": ["x:f32[1,4]"], "outputs": ["y"], "calibration": "d.npz",
            "input": {"x": {"layout": "NC", "mean": [0.5], "std": [0.5], "low": 0.0, "high": 1.0}},
        }  # fmt: skip
        if rng.random() < 0.3:
            base[rng.choice(["source", "factory", "calibration", "evaluation", "metric"])] = "evil.py:model"
        if rng.random() < 0.3:
            base["input"]["x"][rng.choice(["mean", "std", "low", "high"])] = rng.choice(
                [[0.0], [], float("nan"), 1e400, [1e-50]]
            )
        changed = mutated(base, rng, rng.choice([0, 1, 1, 2]))
        text = "\n".join(f"{json.dumps(str(key))} = {toml_text(item)}" for key, item in changed.items())
        if rng.random() < 0.05:
            text = "a = " + "[" * 50_000
        (home / "sample.toml").write_text(text, errors="replace")
        return command(place, "sample")
    base = {
        "name": "mine", "summary": "What I want.", "max_drop": 0.01,
        "default": {"weights": "int8", "activations": "float"},
        "runtimes": {"onnx": {"weights": "auto", "candidates": ["int8", "int4-g32"]}}, "why": {"onnx": "so"},
    }  # fmt: skip
    changed = mutated(base, rng, rng.choice([0, 1, 1, 2]))
    (place.folder / "p.toml").write_text(
        "\n".join(f"{json.dumps(key)} = {toml_text(v)}" for key, v in changed.items()), errors="replace"
    )
    (place.folder / "m.py").write_text(CODE)
    return command(place, "m.py:model", "--input", "x:f32[1,4]", "--profile", "p.toml")


OPTIONS = (
    "--target", "--runtime", "--profile", "--input", "--output-name", "--factory", "--calibration", "--eval", "--metric",
    "--context", "--kv-cache", "--part", "--lora", "--adapter", "--max-size", "--max-drop",
)  # fmt: skip
INPUTS = (
    "x:f32[1,4]", "x:f32[1," + "9" * 30 + "]", "x:f32[" + "9" * 5000 + "]", "x:f32[100000,100000]", "x:f32[]", "x:i64[1,4]",
    "x:f32[1," + ",".join("1" * 70) + "]", "x", "x:f32[0]", "x:f32[-1]", "é:f32[1,4]", "x:f32[1,4]" * 20, ":f32[1]",
)  # fmt: skip
SIZES = ("1e3GB", "9" * 400, "9" * 400 + "GB", "0", "-1", "nanGB", "1.5.5", "1GBB", "0.0000001", "٣GB", "1 GB")


def options(place: Place) -> list[object]:
    """Options of the command line with values that nobody means."""
    rng = place.random
    (place.folder / "m.py").write_text(CODE)
    rest: list[object] = ["m.py:model", "--input", "x:f32[1,4]"]
    if rng.random() < 0.5:
        from edgeship.core.registry import passes

        tasks = passes()
        name = rng.choice(sorted(tasks))
        fields = sorted(tasks[name].options()) or ["x"]
        value = rng.choice([*NUMBERS, *FLOATS, *TEXTS, "9" * 5000, 3, 5, 33, "none", "true", "1,2", "int4-g3", "int0"])
        rest += [
            "--set",
            f"{name}.{rng.choice(fields)}={value}",
            "--profile",
            rng.choice(["small", "fast", "auto", "balanced"]),
        ]
        if name.startswith(("compress/finetune", "compress/smooth", "check/acc", "compress/cal")) or rng.random() < 0.3:
            np.savez(place.folder / "d.npz", x=np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32))
            rest += ["--calibration", "d.npz"]
    else:
        for _ in range(rng.choice([1, 2])):
            option = rng.choice(OPTIONS)
            pool = {"--input": INPUTS, "--max-size": SIZES, "--max-drop": (*SIZES, "200%", "1%%", "nan")}.get(option)
            rest += [option, rng.choice(pool or [*TEXTS, *NUMBERS, "onnx", "small", "fast", "9" * 5000])]
    return command(place, *[str(item).replace("\0", "") for item in rest])


BENCH = ("--seconds", "--prompt", "--new", "--depth", "--runs", "--device")
CHAT = ("--max-tokens", "--temperature", "--top-k", "--seed", "--runtime", "--adapter")


def bundle(place: Place) -> list[object]:
    """A bundle whose manifest says something else, sealed anew, or whose files are changed; odd options of its commands."""
    rng = place.random
    home = place.folder / "b"
    shutil.copytree(Bundles.small, home)
    manifest = json.loads((home / "manifest.json").read_text())
    main = home / manifest["artifacts"][0]["main"]
    match rng.randrange(4):
        case 0 | 1:
            manifest = mutated(manifest, rng, rng.choice([1, 1, 2, 4]))
        case 2:
            main.write_bytes(flipped(main.read_bytes(), rng))
            for record in manifest["artifacts"][0]["files"]:
                content = (home / record["path"]).read_bytes()
                record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        case 3:
            pass
    content = json.dumps(manifest).encode()
    (home / "manifest.json").write_bytes(flipped(content, rng) if rng.random() < 0.1 else content)
    digest = hashlib.sha256((home / "manifest.json").read_bytes()).hexdigest()
    (home / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    said = [*NUMBERS, *FLOATS, *TEXTS]
    match rng.choice(["inspect", "verify", "bench", "chat"]):
        case "bench":
            extra = [rng.choice(BENCH), rng.choice(said)] if rng.random() < 0.4 else []
            extra += ["--seconds", "0.01"] if "--seconds" not in extra else []
            return ["bench", "b", *[str(item).replace("\0", "") for item in extra]]
        case "chat":
            extra = [rng.choice(CHAT), rng.choice(said)] if rng.random() < 0.7 else []
            return ["chat", "b", "--prompt", "a", *[str(item).replace("\0", "") for item in extra]]
        case verb:
            return [verb, "b", *(["--json"] if rng.random() < 0.5 else [])]


class Bundles:
    """Bundles that cases copy; the tests set them."""

    small: Path


def cross_kind(place: Place) -> list[object]:
    """A file of one kind under the name of another, an empty one, a folder, a link to itself."""
    rng = place.random
    name = f"m{rng.choice(['.onnx', '.pt2', '.pt', '.bin', '.safetensors', '.py', '.toml', '.npz', '', '.tflite', '.gguf'])}"
    path = place.folder / name
    match rng.randrange(6):
        case 0:
            path.write_bytes(b"")
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(path)
        case 3:
            path.write_bytes(bytes(rng.randrange(256) for _ in range(rng.choice([1, 7, 8, 28, 300]))))
        case 4:
            good_pt2(place.folder / "x.pt2").rename(path)
        case 5:
            path.write_bytes(onnx_bases()[rng.randrange(6)].SerializeToString())
    rest = ["--factory", "factory.py:model", "--input", "x:f32[1,4]"] if rng.random() < 0.4 else []
    if rest:
        (place.folder / "factory.py").write_text(CODE)
    return command(place, f"{name}{rng.choice(['', '', '', '/', ':f', '/..'])}", *rest)


KINDS: dict[str, Callable[[Place], list[object]]] = {
    "onnx": onnx_structure, "large onnx": onnx_large, "safetensors": safetensors, "pt2": exported,
    "checkpoint": checkpoint, "data": data, "folder": folder, "toml": toml, "options": options, "bundle": bundle,
    "cross": cross_kind,
}  # fmt: skip
# How many of 400 cases each kind gets.
SHARES = {
    "onnx": 90, "large onnx": 24, "safetensors": 30, "pt2": 60, "checkpoint": 36, "data": 36, "folder": 30, "toml": 30,
    "options": 44, "bundle": 40, "cross": 20,
}  # fmt: skip


def makers(count: int, seed: int = 0) -> list[tuple[str, int, Maker]]:
    """Cases in proportion to `SHARES`: (kind, seed, maker)."""
    total = sum(SHARES.values())
    found: list[tuple[str, int, Maker]] = []
    for kind, share in SHARES.items():
        wanted = max(1, round(share * count / total))
        # Seeds are apart by kind, so that one kind may grow and the others stay.
        start = seed + zlib.crc32(kind.encode()) % 10**6 * 1000
        found += [(kind, start + index, KINDS[kind]) for index in range(wanted)]
    return found
