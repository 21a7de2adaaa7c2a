"""Only `edgeship/compat/` names what other libraries do not document: their private names, and modules of theirs that
their documentation does not have."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "edgeship"

# Library -> modules that its documentation, or its README, tells users to import from. "" is the library itself.
# A module that is not here and should be: add it when it is documented, else give it a function in edgeship/compat/.
DOCUMENTED = {
    "torch": (
        "", "ao", "backends", "export", "export.graph_signature", "func", "fx", "fx.node", "nn", "nn.functional", "onnx",
        "ops", "overrides", "random", "utils",
    ),
    # The converter, its builder (custom operators), its types and its graph passes are in the user guide.
    "coremltools": (
        "", "converters.mil", "converters.mil.mil", "converters.mil.mil.passes.graph_pass",
    ),
    "coreai": ("authoring", "runtime"),
    "coreai_torch": ("",),
    "litert_torch": ("",),
    # Python of the published schema of the format.
    "ai_edge_litert": ("compiled_model", "cpu_options", "interpreter", "options", "schema_py_generated"),
    "litert_lm": ("",),
    "onnx_ir": ("", "passes", "passes.common"),
    "onnxscript": ("optimizer", "rewriter"),
    "onnxruntime": ("",),
    "onnxruntime_genai": ("",),
    "onnxruntime_qnn": ("",),
    "optimum": ("exporters.tasks", "utils"),
    "transformers": ("", "cache_utils", "activations", "generation", "modeling_outputs"),
    "safetensors": ("", "torch"),
    "google": ("protobuf.message",),
    "peft": ("",),
}  # fmt: skip
# Being rewritten: whoever takes the last private name out of one of these takes it out of this list.
PENDING: set[str] = set()
# All of their modules are public but those that begin with an underscore.
PLAIN = {
    "PIL", "click", "flatbuffers", "jinja2", "jsonschema", "numpy", "onnx", "packaging", "platformdirs", "psutil", "rich",
    "scipy", "sklearn", "tokenizers",
}  # fmt: skip
# Public in spite of how it is spelled.
PUBLIC = {"os._exit"}
# Named tuples begin their documented methods so, to leave every other name to their fields.
NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
CALLS = ("getattr", "hasattr", "setattr", "delattr", "import_module", "find_spec", "getLogger")


def is_private(name: str) -> bool:
    special = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not special and name not in NAMED_TUPLES


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "compat" not in path.relative_to(PACKAGE).parts]


def own_names(trees: dict[Path, ast.AST]) -> Counter[str]:
    """How often edgeship defines each private attribute, function or class: in a class, or on an object."""
    classes = (node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return Counter(name for kind in classes for name in set(defined(kind)) if is_private(name))


def defined(kind: ast.ClassDef) -> Iterator[str]:
    """The attributes that a class defines: in its body, or on ``self`` in its methods."""
    for node in kind.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == ["self"]:
            yield node.attr


def dotted(node: ast.expr) -> list[str]:
    """``a.b.c`` as its parts; empty for anything else than names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


class File:
    """What one file names of other libraries."""

    def __init__(self, tree: ast.AST, own: Counter[str]) -> None:
        self.tree, self.own = tree, own
        # Name in the file -> what it stands for.
        self.foreign: dict[str, str] = {}
        # Names of operators are torch's published schema, whatever they begin with.
        self.operators = {"torch.ops"}

    def findings(self) -> Iterator[tuple[int, str]]:
        """(line, what) of everything that belongs behind a door."""
        nodes = list(ast.walk(self.tree))
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from self._imported(node)
        for node in nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and self._is_operator(dotted(node.value)):
                self.operators.update(dotted(node.targets[0])[:1])
        for node in nodes:
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                yield from self._attribute(node)
            elif isinstance(node, ast.Call):
                yield from self._told(node)

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
        for alias in node.names:
            if isinstance(node, ast.Import):
                module, whole = alias.name, alias.name
                self.foreign[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
            else:
                module, whole = node.module or "", f"{node.module}.{alias.name}"
                self.foreign[alias.asname or alias.name] = whole
            library, _, inner = module.partition(".")
            if library == "edgeship":
                self.foreign.pop(alias.asname or alias.name, None)
                continue
            if any(map(is_private, whole.split("."))):
                yield node.lineno, f"imports {whole}"
            elif library not in sys.stdlib_module_names and library not in PLAIN:
                allowed = DOCUMENTED.get(library, ())
                if inner not in allowed and f"{inner}.{alias.name}".lstrip(".") not in allowed:
                    yield node.lineno, f"imports from {module}, which {library} does not document"

    def _is_operator(self, parts: list[str]) -> bool:
        return bool(parts) and (parts[0] in self.operators or parts[:2] == ["torch", "ops"])

    def _attribute(self, node: ast.Attribute) -> Iterator[tuple[int, str]]:
        parts = dotted(node)
        what = ast.unparse(node)
        if parts and parts[0] in self.foreign and parts[0] not in ("self", "cls"):
            whole = ".".join([self.foreign[parts[0]], *parts[1:]])
            if not self._is_operator(parts) and whole not in PUBLIC:
                yield node.lineno, f"reads {whole}"
        elif isinstance(node.value, ast.Call) and dotted(node.value.func) == ["super"]:
            # Defined in the class itself, and once more where it comes from.
            if self.own[node.attr] < 2:
                yield node.lineno, f"reads {what} of a library's class"
        elif not self._is_operator(parts) and not self.own[node.attr]:
            yield node.lineno, f"reads {what}, which edgeship does not define"

    def _told(self, node: ast.Call) -> Iterator[tuple[int, str]]:
        name = (dotted(node.func) or [""])[-1]
        if name not in CALLS:
            return
        for item in node.args:
            if isinstance(item, ast.Constant) and isinstance(item.value, str):
                parts = item.value.split(".")
                if any(map(is_private, parts)) and not self.own[parts[-1]]:
                    yield node.lineno, f"names {item.value!r}"


def findings_in(text: str, own: Counter[str] | None = None) -> list[str]:
    return [what for _, what in File(ast.parse(text), own or Counter()).findings()]


def test_only_compat_names_what_other_libraries_keep_private() -> None:
    trees: dict[Path, ast.AST] = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files()}
    own = own_names(trees)
    found, pending = [], set()
    for path, tree in trees.items():
        place = path.relative_to(PACKAGE).as_posix()
        for line, what in sorted(set(File(tree, own).findings())):
            if place in PENDING:
                pending.add(place)
            else:
                found.append(f"edgeship/{place}:{line} {what}")
    assert pending == PENDING, "take these out of PENDING"
    assert not found, "give each a function in edgeship/compat/ and a canary test:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import torch._export.serde",
        "from torch._subclasses import fake_tensor",
        "from onnxscript.rewriter import _DEFAULT_REWRITE_RULES",
        "import torch\ntorch.utils._pytree.tree_leaves(1)",
        "import torch\ntorch._ops.OpOverload",
        "import torch\nexported._graph_module = 1",
        "import torch\nvalue = module._parameters",
        "class A(Base):\n    def _step(self):\n        super()._step()",
        "getattr(target, '_schema', None)",
        "import importlib\nimportlib.import_module('torch._inductor')",
        "import logging\nlogging.getLogger('torch._dynamo')",
        "import pickle\npickle._Unpickler",
        "from coremltools.converters.mil.frontend.torch.ops import add",
        "import litert_torch.backend.export",
        "from transformers.models.falcon import modeling_falcon",
    ],
)
def test_private_names_are_found(text) -> None:
    assert len(findings_in(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\naten = torch.ops.aten\naten._unsafe_view.default",
        "import torch\ntorch.ops.aten._to_copy.default",
        "import os\nos._exit(1)",
        "class A:\n    def __init__(self):\n        self._own = 1\n    def see(self):\n        return self._own",
        "from torch.fx import Graph",
        "import coremltools as ct\nct.convert",
        "from edgeship.core import model",
        "from edgeship.compat.torch import FakeTensor",
        "x.__class__.__name__",
    ],
)
def test_public_names_are_left_alone(text) -> None:
    assert findings_in(text, own_names({Path("a.py"): ast.parse(text)})) == []


def test_every_door_has_its_canaries() -> None:
    doors = {path.stem for path in (PACKAGE / "compat").glob("*.py")} - {"__init__"}
    assert doors == {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "compat").glob("test_*.py")}
