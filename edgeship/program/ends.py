"""``--cut``: a model that ends at values of the user's choice, before what comes behind them is converted.

A name is a module of the model (what it returns, as often as it runs) or a node of the exported graph. Modules are
watched while the model runs, which stops when the last of them has answered: what comes behind need not be exportable.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.core.names import quoted
from edgeship.errors import EdgeshipError, UsageError

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule, Node

Call = Callable[..., Any]
SHOWN = 12


class _ReachedError(Exception):
    """The last value that was asked for is there."""


def end_at(
    module: torch.nn.Module, call: Call | None, examples: Sequence[torch.Tensor], names: Sequence[str]
) -> tuple[torch.nn.Module, Call | None]:
    """The module, or another in its place, and how to call it so that it answers the named values, by name.

    Args:
        call: how the module itself is called, see `make_program`. examples: one tensor an input.

    Raises:
        UsageError: no module and no node has that name, it does not run, or makes no tensor.
    """
    from torch.fx import GraphModule

    known = {name: part for name, part in module.named_modules() if name}
    if not isinstance(module, GraphModule) and all(name in known for name in names):
        return module, _stopping(module, call, examples, names)
    try:
        flat = _traced(module, call, examples)
    except EdgeshipError as error:
        lost = quoted(next(name for name in names if name not in known))
        raise UsageError(
            f"--cut {lost}: no module of the model has that name, and the whole of it has no graph: {error.what}",
            fix=near(lost, known),
        ) from error
    _end_graph(flat, names, known)
    return flat, lambda made, *tensors: dict(zip(names, made(*tensors), strict=True))


def near(name: str, known: Iterable[str]) -> str:
    """The way out for a name that is not there: the nearest real ones."""
    names = [item for item in known if item]
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    found = found or [item for item in names if name and name.lower() in item.lower()][:3]
    if found:
        return f"did you mean {' or '.join(found)}?"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"known: {', '.join(names[:SHOWN])}{more}"


def check_ends(uses_inputs: bool, names: Sequence[str]) -> None:
    """Raise `UsageError` where nothing of what is left depends on an input."""
    if not uses_inputs:
        raise UsageError(
            f"--cut {' '.join(names)}: what is left uses no input of the model",
            fix="name values that are computed from an input",
        )


def _stopping(
    module: torch.nn.Module, call: Call | None, examples: Sequence[torch.Tensor], names: Sequence[str]
) -> Call:
    """How to call the module so that it stops behind the last of the named modules."""
    import torch

    def whole(made: torch.nn.Module, *tensors: torch.Tensor) -> Any:
        """Tensors in the shapes of the inputs."""
        return made(*tensors) if call is None else call(made, *tensors)

    with torch.no_grad():
        seen = _seen(module, whole, [example.clone() for example in examples], names, {})
    for name in names:
        if not seen[name]:
            raise UsageError(f"--cut {name}: the model does not run that module", fix="name one that runs")
        if not _named(name, seen[name]):
            raise UsageError(f"--cut {name}: that module returns no tensor", fix="name one that does")
    counts = {name: len(seen[name]) for name in names}

    def answer(made: torch.nn.Module, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors in the shapes of the inputs; values in their own."""
        found: dict[str, torch.Tensor] = {}
        for name, answers in _seen(made, whole, tensors, names, counts).items():
            found.update(_named(name, answers))
        return found

    return answer


def _seen(
    module: torch.nn.Module, whole: Call, tensors: Sequence[torch.Tensor], names: Sequence[str], counts: dict[str, int]
) -> dict[str, list[Any]]:
    """What each named module answers, each time that it runs; with ``counts`` no further than that."""
    from edgeship.compat.torch import outside_of_tracing

    found: dict[str, list[Any]] = {name: [] for name in names}

    def hook_of(name: str) -> Any:
        def hook(part: Any, given: Any, answer: Any) -> None:
            found[name].append(answer)
            if counts and all(len(found[other]) >= counts[other] for other in names):
                raise _ReachedError

        return hook

    handles = [module.get_submodule(name).register_forward_hook(hook_of(name)) for name in dict.fromkeys(names)]
    try:
        with outside_of_tracing():
            whole(module, *tensors)
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _named(name: str, answers: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The tensors among what a module answered, under its name; several with numbers, or the keys of a dict."""
    import torch

    from edgeship.compat.torch import leaves_of

    if len(answers) == 1 and isinstance(answers[0], dict):
        kept = {f"{name}.{key}": value for key, value in answers[0].items() if isinstance(value, torch.Tensor)}
        if len(kept) == len(leaves_of(answers[0])):
            return kept
    tensors = [leaf for leaf in leaves_of(list(answers)) if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1:
        return {name: tensors[0]}
    return {f"{name}.{place}": tensor for place, tensor in enumerate(tensors)}


def _traced(module: torch.nn.Module, call: Call | None, examples: Sequence[torch.Tensor]) -> GraphModule:
    """The module as a graph with tensors in and out by position, its nodes named as torch names them."""
    from torch.fx import GraphModule

    from edgeship.program.normalize import flattened, traced

    if isinstance(module, GraphModule):
        count = sum(1 for node in module.graph.nodes if node.op == "placeholder")
        return flattened(module, tuple(f"input_{place}" for place in range(count)), "")
    program = traced(_holding(module, call), tuple(examples))
    return flattened(
        program.module(check_guards=False), tuple(f"input_{place}" for place in range(len(examples))), "model"
    )


def _holding(module: torch.nn.Module, call: Call | None) -> torch.nn.Module:
    import torch

    class Holding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *tensors: torch.Tensor) -> Any:
            """Tensors in the shapes of the inputs; what the module answers."""
            return self.model(*tensors) if call is None else call(self.model, *tensors)

    return Holding().eval()


def _end_graph(flat: GraphModule, names: Sequence[str], modules: Iterable[str]) -> None:
    """Let a graph return the named nodes, and drop what is behind them."""
    import torch

    found = []
    for name in names:
        node = _node_of(flat.graph, name)
        if node is None:
            known = [*modules, *(item.name for item in flat.graph.nodes if item.op == "call_function")]
            raise UsageError(
                f"--cut {quoted(name)}: no module and no node of the graph has that name", fix=near(name, known)
            )
        if not isinstance(node.meta.get("val"), torch.Tensor):
            parts = ", ".join(user.name for user in node.users)
            raise UsageError(f"--cut {name}: that node makes no single tensor", fix=f"name one of its parts: {parts}")
        found.append(node)
    flat.graph.output_node().args = (tuple(found),)
    flat.graph.eliminate_dead_code()
    flat.recompile()


def _node_of(graph: Graph, name: str) -> Node | None:
    """The node of a name, or the last one that the module of that path computes."""
    last = None
    for node in graph.nodes:
        if node.op == "call_function" and node.name == name:
            return node  # type: ignore[no-any-return]
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack and str(stack[-1][0]).removeprefix("model.") == name:
            last = node
    return last
