"""Which module of a model was running when it failed, and what had run before it: where ``--cut`` can end the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_WATCHED = 5000


class Watch:
    """The modules of a model in the order in which they run.

    Args:
        model: its own modules are watched while `running` is active.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._inside: list[str] = [""]
        self._done: dict[str, list[str]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, what runs is noted."""
        named = [(name, module) for name, module in self._model.named_modules() if name]
        handles: list[Any] = []
        for name, module in named[:MAX_WATCHED]:
            handles.append(module.register_forward_pre_hook(self._begun(name)))
            handles.append(module.register_forward_hook(self._ended(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begun(self, name: str) -> Any:
        def hook(module: Any, given: Any) -> None:
            self._inside.append(name)

        return hook

    def _ended(self, name: str) -> Any:
        def hook(module: Any, given: Any, answer: Any) -> None:
            while len(self._inside) > 1 and self._inside.pop() != name:
                pass
            self._done.setdefault(self._inside[-1], []).append(name)

        return hook

    def last(self) -> str:
        """The last module with weights that had ended, as near to where the model is as there is one; or nothing."""
        modules = dict(self._model.named_modules())
        for running in reversed(self._inside):
            for name in reversed(self._done.get(running, [])):
                if any(True for _ in modules[name].parameters()):
                    return name
        return ""
