"""How readable the package is, in figures: what a stranger meets in its files, before a change and after it.

    python benchmarks/readability.py                         # the working tree, and its worklist
    python benchmarks/readability.py --before a8ac63a        # both, side by side
    python benchmarks/readability.py --before a8ac63a --write docs/results/readability.md

Only ``edgeship/`` is read. Complexity is ruff's C901; everything else is counted from Python's syntax tree and tokens.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# An annotation with one of these words says that a function takes or returns numbers that have a shape.
TENSOR = re.compile(r"\b(Tensor|NDArray|ndarray|EncodedTensor|QuantizedTensor|SparseTensor|PaletteTensor)\b")
# ``[out, in / group]``, ``[..., 2]``, ``(N, K)``; or in words: any shape, per channel, by element, along an axis.
SHAPE = re.compile(
    r"(?<![\w\])])\[(?:\.\.\.|\*|[a-zA-Z0-9])[^\]\n]*\]"
    r"|``\([^)`]*,[^)`]*\)``|(?-i:\([A-Z]\w*, [A-Z*]\w*[^)]*\))"
    r"|shapes?\b|\balong ``|\bscalars?\b|\bax[ei]s\b|\bdimensions?\b|\bchannels?\b|\brows?\b|\bcolumns?\b|\belements?\b|\belementwise\b",
    re.IGNORECASE,
)
# Families of models. The package asks what a model computes; only these folders may name one.
FAMILIES = re.compile(
    r"llama(?!2\.?c)|gemma|qwen|mistral|mixtral|falcon|openelm|gpt_?neo|gpt_?j|gptoss|gpt_?2|(?<!ops\.)codegen(?!_)|deepseek"
    r"|olmo|smollm|stablelm|starcoder|granite|cohere|pythia|bloom|\bmpt\b|\bphi(?=\d|-|_)",
    re.IGNORECASE,
)
FAMILIES_MAY_STAND = ("compat/",)
DENSEST = 40


@dataclass
class Function:
    """One function or method, without the functions inside it."""

    where: str
    lines: int
    conditionals: int
    comprehensions: int
    inside: int
    """Comprehensions or conditional expressions that stand inside another of their kind."""

    @property
    def density(self) -> float:
        """Ranks the worklist: how much is packed into the function, and how tightly."""
        packed = self.conditionals + self.comprehensions + 2 * self.inside
        return packed * packed / self.lines


@dataclass
class Figures:
    """What one tree comes to."""

    modules: int = 0
    lines: int = 0
    """Lines that are not blank."""
    comments: int = 0
    conditionals: int = 0
    comprehensions: int = 0
    nested: list[str] = field(default_factory=list)
    nested_conditionals: list[str] = field(default_factory=list)
    complexity: list[tuple[int, str]] = field(default_factory=list)
    tensor_functions: int = 0
    shapeless: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    cycles: list[list[str]] = field(default_factory=list)
    shared_names: dict[str, list[str]] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)

    def per_thousand(self, count: int) -> float:
        """``count`` per 1000 lines that are not blank."""
        return 1000 * count / self.lines

    @property
    def shape_share(self) -> float:
        """Share of the functions that take or return tensors whose docstring or comments name a shape."""
        return 1 - len(self.shapeless) / max(1, self.tensor_functions)

    @property
    def sharing(self) -> int:
        """Modules whose bare name another module has too."""
        return sum(len(paths) for paths in self.shared_names.values())

    @property
    def densest(self) -> list[Function]:
        """The forty functions that pack most."""
        return sorted(self.functions, key=lambda function: -function.density)[:DENSEST]


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of ``function`` without those of functions and classes inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def holds_another(node: ast.AST, kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> bool:
    """Whether a node of ``kind`` stands somewhere inside ``node``."""
    return any(isinstance(inner, kind) for inner in ast.walk(node) if inner is not node)


def nested_comprehension(node: ast.AST) -> bool:
    """A comprehension inside a comprehension (two ``for`` of one comprehension are not counted)."""
    return isinstance(node, COMPREHENSIONS) and holds_another(node, COMPREHENSIONS)


def comments_of(text: str) -> dict[int, str]:
    """Line -> its comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def takes_tensors(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether an annotation of an argument or of the result names a tensor."""
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    annotations = [argument.annotation for argument in arguments] + [function.returns]
    return any(TENSOR.search(ast.unparse(annotation)) for annotation in annotations if annotation is not None)


def names_a_shape(function: ast.FunctionDef | ast.AsyncFunctionDef, comments: dict[int, str]) -> bool:
    """Whether the docstring or a comment of ``function`` says what shape something has."""
    last = function.end_lineno or function.lineno
    said = [comments[line] for line in range(function.lineno, last + 1) if line in comments]
    said.append(ast.get_docstring(function) or "")
    return any(SHAPE.search(text) for text in said)


def named(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function with its name; a method's begins with its class."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS):
                yield prefix + child.name, child
            inner = prefix + child.name + "." if isinstance(child, (*FUNCTIONS, ast.ClassDef)) else prefix
            waiting.append((inner, child))


def read_module(path: Path, package: Path, figures: Figures) -> None:
    """Add what one file comes to."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    comments = comments_of(text)
    place = path.relative_to(package).as_posix()
    figures.modules += 1
    figures.lines += sum(1 for line in text.splitlines() if line.strip())
    figures.comments += len(comments)
    for node in ast.walk(tree):
        figures.conditionals += isinstance(node, ast.IfExp)
        figures.comprehensions += isinstance(node, COMPREHENSIONS)
        if nested_comprehension(node):
            figures.nested.append(f"{place}:{node.lineno}")
        if isinstance(node, ast.IfExp) and holds_another(node, ast.IfExp):
            figures.nested_conditionals.append(f"{place}:{node.lineno}")
    for name, function in named(tree):
        nodes = list(own_nodes(function))
        conditionals = [node for node in nodes if isinstance(node, ast.IfExp)]
        comprehensions = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
        inside = sum(holds_another(node, ast.IfExp) for node in conditionals)
        inside += sum(holds_another(node, COMPREHENSIONS) for node in comprehensions)
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        where = f"{place}:{name}"
        figures.functions.append(Function(where, lines, len(conditionals), len(comprehensions), inside))
        if takes_tensors(function):
            figures.tensor_functions += 1
            if not names_a_shape(function, comments):
                figures.shapeless.append(where)
    if not place.startswith(FAMILIES_MAY_STAND):
        for number, line in enumerate(text.splitlines(), 1):
            if match := FAMILIES.search(line):
                figures.families.append(f"{place}:{number} {match.group()}")


def imports_of(tree: ast.Module, module: str, modules: set[str]) -> set[str]:
    """The modules of the package that ``module`` imports when it is loaded, or for its types alone."""
    found: set[str] = set()
    for node in own_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # ``from a import b`` is module a.b where there is one, else a name in a.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return (found & modules) - {module}


def cycles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or in a circle (strongly connected, by Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return groups


def module_name(path: Path, package: Path) -> str:
    """``edgeship.core.plan`` for its file; a package is named by its folder."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def complexities(package: Path) -> list[tuple[int, str]]:
    """Each function with ruff's C901 count, largest first."""
    setting = "lint.mccabe.max-complexity=0"
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "C901", "--config", setting]
    done = subprocess.run([*ruff, "--output-format", "json", str(package)], capture_output=True, text=True, check=False)
    found = []
    for row in json.loads(done.stdout):
        match = re.match(r"`(.+)` is too complex \((\d+) > 0\)", row["message"])
        if match:
            place = Path(row["filename"]).resolve().relative_to(package.resolve()).as_posix()
            found.append((int(match.group(2)), f"{place}:{match.group(1)}"))
    return sorted(found, key=lambda item: (-item[0], item[1]))


def read_tree(package: Path) -> Figures:
    """Everything about the package in the folder ``package``."""
    figures = Figures(complexity=complexities(package))
    paths = sorted(package.rglob("*.py"))
    modules = {module_name(path, package) for path in paths}
    graph = {}
    bare = defaultdict(list)
    for path in paths:
        read_module(path, package, figures)
        name = module_name(path, package)
        graph[name] = imports_of(ast.parse(path.read_text(encoding="utf-8")), name, modules)
        if path.stem != "__init__":
            bare[path.stem].append(path.relative_to(package).as_posix())
    figures.cycles = cycles_of(graph)
    figures.shared_names = {stem: places for stem, places in sorted(bare.items()) if len(places) > 1}
    return figures


def read_commit(commit: str) -> Figures:
    """The package as it was at ``commit``."""
    archive = subprocess.run(["git", "archive", commit, "edgeship"], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return read_tree(Path(folder) / "edgeship")


def rows(figures: Figures) -> dict[str, str]:
    """The table's column for one tree."""
    most, where = figures.complexity[0]
    over = sum(1 for count, _ in figures.complexity if count > 15)
    return {
        "modules": str(figures.modules),
        "lines that are not blank": str(figures.lines),
        "largest complexity (C901)": f"{most} (`{where}`)",
        "functions above 15": str(over),
        "nested comprehensions": str(len(figures.nested)),
        "nested conditional expressions": str(len(figures.nested_conditionals)),
        "conditional expressions per 1000 lines": f"{figures.per_thousand(figures.conditionals):.1f}",
        "comprehensions per 1000 lines": f"{figures.per_thousand(figures.comprehensions):.1f}",
        "comment lines per 1000 lines": f"{figures.per_thousand(figures.comments):.1f}",
        "functions that take or return tensors": str(figures.tensor_functions),
        "of them, shapes named": f"{figures.shape_share:.0%}",
        "import cycles": str(len(figures.cycles)),
        "lines that name a family of models": str(len(figures.families)),
        "modules that share their bare name": str(figures.sharing),
        "density of the 40th densest function": f"{figures.densest[-1].density:.2f}",
    }


def table(columns: dict[str, Figures]) -> str:
    """A Markdown table, one column a tree."""
    cells = {title: rows(figures) for title, figures in columns.items()}
    lines = ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for label in next(iter(cells.values())):
        lines.append(f"| {label} | " + " | ".join(column[label] for column in cells.values()) + " |")
    return "\n".join(lines)


def then_and_now(before: Figures, after: Figures) -> str:
    """The forty densest functions of the earlier tree, and what became of each."""
    now = {function.where: function for function in after.functions}
    lines = ["## The forty densest functions before", "", "| function | density before | after |", "|---|---|---|"]
    for function in before.densest:
        found = now.get(function.where)
        lines.append(f"| `{function.where}` | {function.density:.2f} | {f'{found.density:.2f}' if found else 'gone'} |")
    return "\n".join(lines)


def worklist(figures: Figures) -> str:
    """What a next reader would change first."""
    lines = [
        "## The forty densest functions now",
        "",
        "| function | lines | conditional | comprehensions | nested | density |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for function in figures.densest:
        counts = f"{function.lines} | {function.conditionals} | {function.comprehensions} | {function.inside}"
        lines.append(f"| `{function.where}` | {counts} | {function.density:.2f} |")
    lines += ["", "## Import cycles", ""]
    lines += ["- " + ", ".join(f"`{module}`" for module in group) for group in figures.cycles] or ["None."]
    lines += ["", "## Bare names that several modules share", ""]
    for stem, places in figures.shared_names.items():
        lines.append(f"- `{stem}`: " + ", ".join(f"`{place}`" for place in places))
    lines += ["", "## Lines that name a family of models", ""]
    by_file: dict[str, list[str]] = defaultdict(list)
    for line in figures.families:
        place, word = line.split(" ", 1)
        name, number = place.rsplit(":", 1)
        by_file[name].append(f"{number} {word}")
    lines += [f"- `{name}`: {', '.join(words)}" for name, words in by_file.items()] or ["None."]
    return "\n".join(lines)


def page(before: str, columns: dict[str, Figures]) -> str:
    """docs/results/readability.md."""
    after = columns["after"]
    compared = "".join(then_and_now(figures, after) + "\n" for title, figures in columns.items() if title != "after")
    return f"""# How readable the package is

Written by `benchmarks/readability.py --before {before} --write docs/results/readability.md`, which reads `edgeship/` alone.
Complexity is ruff's C901. A comprehension is nested where it stands inside another one. A function "takes or returns tensors" where an
annotation says so (`torch.Tensor`, `npt.NDArray`, `EncodedTensor`, ...); its shapes are named where its docstring or one of its
comments says them (`[out, in]`, or in words). Import cycles count what is imported for types alone too, and not what functions
import when they run. Density is (conditional expressions + comprehensions + 2 x those nested)² / lines.

{table(columns)}

{compared}
{worklist(after)}
"""


def main() -> None:
    """Print the table, and write the page where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="a commit to stand beside the working tree")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--list", choices=("nested", "shapeless", "nested_conditionals"), help="print one worklist")
    options = parser.parse_args()
    after = read_tree(ROOT / "edgeship")
    columns = {"after": after}
    if options.before:
        columns = {f"before ({options.before})": read_commit(options.before), "after": after}
    if options.list:
        print("\n".join(getattr(after, options.list)))
    elif options.write:
        options.write.write_text(page(options.before or "COMMIT", columns), encoding="utf-8")
    else:
        print(table(columns) + "\n\n" + worklist(after))


if __name__ == "__main__":
    main()
