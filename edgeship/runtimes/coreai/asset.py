"""A loaded asset: Core AI's runtime behind plain calls."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from edgeship.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")

ON_MAC = sys.platform == "darwin"


class LoadedAsset:
    """A program with an event loop of its own, in a thread: it works from sync code and in notebooks.

    Args:
        path: the asset. entries: names of the entry points that will be called.

    Raises:
        ArtifactError: it does not load, or has no such entry point.
    """

    def __init__(self, path: Path, entries: Sequence[str]) -> None:
        self._path = path
        self._folder = TemporaryDirectory(prefix="edgeship-coreai-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coreai", daemon=True)
        self._thread.start()
        try:
            from coreai.authoring import AIModelAsset

            if ON_MAC:
                asset = AIModelAsset.load(path)
            else:
                from edgeship.runtimes.coreai.widened import runnable

                asset = runnable(path, Path(self._folder.name))
            self._model = asset.executable()
            model = self._wait(self._model.__aenter__())
            self._functions = {entry: model.load_function(entry) for entry in entries}
            for entry, function in self._functions.items():
                if function is None:
                    raise ArtifactError(f"{path} has no entry point {entry}", fix="build it again")
        except ArtifactError:
            self._stop()
            raise
        except Exception as error:
            self._stop()
            raise ArtifactError(
                f"Core AI cannot load {path}: {' '.join(str(error).split())[:200]}", fix="build it again"
            ) from error

    def expect(self, entry: str, inputs: Sequence[str]) -> None:
        """Refuse an asset whose entry point takes other inputs."""
        names = set(self._functions[entry].desc.input_names)
        if names != set(inputs):
            raise ArtifactError(
                f"{self._path} takes {', '.join(sorted(names))}, not {', '.join(sorted(inputs))}", fix="build it again"
            )

    def new_states(self, entry: str) -> dict[str, npt.NDArray[Any]]:
        """Zeros for every state of an entry point. Shapes are the asset's."""
        import numpy as np

        description = self._functions[entry].desc
        found = {}
        for name in description.state_names:
            wanted = description.state_descriptor(name)
            found[name] = np.zeros(tuple(wanted.shape), wanted.dtype)
        return found

    def run(
        self, entry: str, inputs: Mapping[str, npt.NDArray[np.generic]], states: Mapping[str, Any] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Run once.

        Shapes are those of the entry point.

        Args:
            states: Core AI's arrays, which are written.
        """
        import numpy as np
        from coreai.runtime import NDArray

        given = {name: NDArray(np.asarray(array, order="C")) for name, array in inputs.items()}
        results = self._wait(self._functions[entry](given, state=dict(states or {})))
        return {name: result.numpy().copy() for name, result in results.items()}

    def close(self) -> None:
        """Free the program and end the thread."""
        if self._loop.is_running():
            self._functions.clear()
            self._wait(self._model.__aexit__(None, None, None))
            self._stop()

    def _wait(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()
