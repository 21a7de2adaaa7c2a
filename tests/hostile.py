"""Files that would run code if something loaded them carelessly. Each leaves a canary when its code runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = "m/"


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


class BuildTouch:
    """Runs through an object's state: ``__setstate__`` of a class that calls what it is given."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.canary)!r}, 'w')",)


def touched(canary: Path) -> bytes:
    """A pickle as torch saves it, that touches the canary."""
    import torch

    buffer = io.BytesIO()
    torch.save(Touch(canary), buffer)
    return buffer.getvalue()


def good_pt2(path: Path) -> Path:
    """A linear layer, exported."""
    import torch

    torch.manual_seed(0)
    program = torch.export.export(torch.nn.Linear(4, 3).eval(), (torch.ones(1, 4),))
    torch.export.save(program, path)
    return path


Change = Callable[[dict[str, bytes], Path], None]


def changed_pt2(path: Path, change: Change, canary: Path) -> Path:
    """A good archive with its entries changed."""
    good = good_pt2(path.with_name("good.pt2"))
    with zipfile.ZipFile(good) as archive:
        root = archive.namelist()[0].partition("/")[0]
        entries = {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()}
    good.unlink()
    change(entries, canary)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(ROOT + name, content)
    return path


def graph_of(entries: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> None:
    """Change the graph's JSON."""
    data = json.loads(entries["models/model.json"])
    change(data)
    entries["models/model.json"] = json.dumps(data).encode()


def payload_of(entries: dict[str, bytes], part: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the table of weights or constants."""
    name = f"data/{part}/model_{part}_config.json"
    data = json.loads(entries[name])
    change(data["config"])
    entries[name] = json.dumps(data).encode()


def _samples(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/sample_inputs/model.pt"] = touched(canary)


def _pickled_weight(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/weights/weight_0"] = touched(canary)
    payload_of(entries, "weights", lambda table: next(iter(table.values())).update(use_pickle=True))


def _legacy_weights(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/weights/model.pt"] = touched(canary)


def _legacy_constants(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/constants/model.pt"] = touched(canary)


def _opaque(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Touch(canary))
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    payload_of(entries, "constants", lambda table: table.update(thing=meta))


def _custom(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/constants/custom_obj_0"] = touched(canary)
    meta = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    payload_of(entries, "constants", lambda table: table.update(thing=meta))


def _pickled_constant(entries: dict[str, bytes], canary: Path) -> None:
    entries["data/constants/tensor_7"] = touched(canary)
    meta = {"path_name": "tensor_7", "is_param": False, "use_pickle": True, "tensor_meta": None}
    payload_of(entries, "constants", lambda table: table.update(thing=meta))


def _expression(entries: dict[str, bytes], canary: Path) -> None:
    text = f"__import__('os').system(\"touch '{canary}'\")"

    def change(data: dict[str, Any]) -> None:
        graph = data["graph_module"]["graph"]
        for meta in graph["tensor_values"].values():
            meta["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 3}}}

    graph_of(entries, change)


def _expression_as_list(entries: dict[str, bytes], canary: Path) -> None:
    text = f"__import__('os').system(\"touch '{canary}'\")"

    def change(data: dict[str, Any]) -> None:
        graph = data["graph_module"]["graph"]
        graph["sym_int_values"]["s"] = {"as_expr": {"expr_str": [text], "hint": None}}
        graph["inputs"].append({"as_sym_int": {"as_name": "s"}})

    graph_of(entries, change)


def _bool_expression(entries: dict[str, bytes], canary: Path) -> None:
    text = f"__import__('os').system(\"touch '{canary}'\")"

    def change(data: dict[str, Any]) -> None:
        graph = data["graph_module"]["graph"]
        graph["sym_bool_values"]["b"] = {"as_expr": {"expr_str": text, "hint": None}}
        graph["inputs"].append({"as_sym_int": {"as_name": "b"}})

    graph_of(entries, change)


def _operator(target: str) -> Change:
    def put(entries: dict[str, bytes], canary: Path) -> None:
        def change(data: dict[str, Any]) -> None:
            node = data["graph_module"]["graph"]["nodes"][0]
            node["target"] = target
            node["inputs"] = [{"name": "", "arg": {"as_string": f"touch '{canary}'"}, "kind": 1}]
            data["verifiers"] = []

        graph_of(entries, change)

    return put


def _operator_as_argument(entries: dict[str, bytes], canary: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}

    graph_of(entries, change)


def _writes_a_file(entries: dict[str, bytes], canary: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        node = data["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [
            {"name": "filename", "arg": {"as_string": str(canary)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 4}, "kind": 1},
        ]

    graph_of(entries, change)


def _name_of_a_value(entries: dict[str, bytes], canary: Path) -> None:
    text = f"x):\n        __import__('os').system(\"touch '{canary}'\")\n    def g(self, y"

    def change(data: dict[str, Any]) -> None:
        plain = json.dumps(data["graph_module"])
        name = data["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"]
        data["graph_module"] = json.loads(plain.replace(json.dumps(name), json.dumps(text)))

    graph_of(entries, change)


def _name_of_a_weight(entries: dict[str, bytes], canary: Path) -> None:
    text = f"weight\"), __import__('os').system(\"touch '{canary}'\"), getattr(self, \"weight"

    def change(data: dict[str, Any]) -> None:
        plain = json.dumps(data["graph_module"])
        data["graph_module"] = json.loads(plain.replace('"weight"', json.dumps(text)))

    graph_of(entries, change)
    payload_of(entries, "weights", lambda table: table.update({text: table.pop("weight")}))


def _guard(entries: dict[str, bytes], canary: Path) -> None:
    graph_of(entries, lambda data: data.update(guards_code=[f"__import__('os').system(\"touch '{canary}'\") == 0"]))


def _tree_module(entries: dict[str, bytes], canary: Path) -> None:
    """A tree spec that imports a module, which lies in the current folder."""
    (canary.parent / "hostile_module.py").write_text(f"open({str(canary)!r}, 'w')\n")
    context = json.dumps({"default_factory_module": "hostile_module", "default_factory_name": "x", "dict_context": []})
    enum = json.dumps([{"__enum__": True, "fqn": "hostile_module:X", "name": "x"}])

    def change(data: dict[str, Any]) -> None:
        for entry in data["graph_module"]["module_call_graph"]:
            if entry.get("signature"):
                tree = {"type": "collections.defaultdict", "context": context, "children_spec": []}
                other = {"type": "builtins.dict", "context": enum, "children_spec": [tree]}
                entry["signature"]["out_spec"] = json.dumps([1, tree])
                entry["signature"]["in_spec"] = json.dumps([1, other])

    graph_of(entries, change)


def _argument_name(entries: dict[str, bytes], canary: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for entry in data["graph_module"]["module_call_graph"]:
            if entry.get("signature"):
                entry["signature"]["forward_arg_names"] = [f"x=__import__('os').system(\"touch '{canary}'\")"]

    graph_of(entries, change)


def _library(entries: dict[str, bytes], canary: Path) -> None:
    """A compiled model beside the graph, which torch would load into the process."""
    entries["data/aotinductor/model/evil.so"] = b"\x7fELF" + bytes(60)
    entries["data/aotinductor/model/evil_metadata.json"] = b"{}"


PT2: dict[str, Change] = {
    "pickled sample inputs": _samples,
    "a pickled weight": _pickled_weight,
    "a pickled constant": _pickled_constant,
    "weights of an older form": _legacy_weights,
    "constants of an older form": _legacy_constants,
    "an opaque object": _opaque,
    "a script object": _custom,
    "a size to be evaluated": _expression,
    "a size in a list": _expression_as_list,
    "a truth to be evaluated": _bool_expression,
    "an operator that is os.system": _operator("torch.os.system"),
    "an operator that is a method caller": _operator("_operator.methodcaller"),
    "an operator that loads": _operator("torch.hub.load"),
    "an operator as an argument": _operator_as_argument,
    "an operator that writes a file": _writes_a_file,
    "a value's name": _name_of_a_value,
    "a weight's name": _name_of_a_weight,
    "a tree spec that imports": _tree_module,
    "an argument's name": _argument_name,
}
# What is not read at all, so that the rest of the file builds.
IDLE: dict[str, Change] = {"a guard": _guard, "a compiled library": _library}


def plain_pickle(path: Path, canary: Path) -> Path:
    path.write_bytes(pickle.dumps({"weight": Touch(canary)}))
    return path


def saved_pickle(path: Path, canary: Path) -> Path:
    import torch

    torch.save({"weight": torch.ones(3, 4), "bias": BuildTouch(canary)}, path)
    return path


def old_pickle(path: Path, canary: Path) -> Path:
    import torch

    torch.save({"weight": Touch(canary)}, path, _use_new_zipfile_serialization=False)
    return path


def module_pickle(path: Path, canary: Path) -> Path:
    """Protocol 4, where the name is made on the stack."""
    text = f"touch '{canary}'".encode()
    path.write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.")
    return path


def instance_pickle(path: Path, canary: Path) -> Path:
    """Protocol 0: an instance, whose class is called with what lies on the stack."""
    path.write_bytes(f"(S\"touch '{canary}'\"\nios\nsystem\n.".encode())
    return path


def keyed_pickle(path: Path, canary: Path) -> Path:
    """The call is a key of the dict."""
    text = f"touch '{canary}'".encode()
    path.write_bytes(b"\x80\x02}cposix\nsystem\nU" + bytes([len(text)]) + text + b"\x85RK\x01s.")
    return path


PICKLES: dict[str, Callable[[Path, Path], Path]] = {
    "a plain pickle": plain_pickle,
    "a saved pickle": saved_pickle,
    "a pickle in torch's old form": old_pickle,
    "a name made on the stack": module_pickle,
    "an instance": instance_pickle,
    "a key": keyed_pickle,
}
