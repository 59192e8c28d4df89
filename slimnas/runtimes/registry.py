"""Runtimes by name."""

from __future__ import annotations

import importlib

from slimnas.errors import RuntimeUnavailableError, suggest
from slimnas.runtimes.base import Runtime

RUNTIMES = {
    "onnxruntime": ("slimnas.runtimes.onnxruntime_runtime", "OnnxRuntime"),
    "torch": ("slimnas.runtimes.torch_runtime", "TorchRuntime"),
}
"""Module and class of every runtime, imported only when it is asked for."""


def get_runtime(name: str, *, threads: int = 1) -> Runtime:
    """Return the runtime called `name`, which will run on `threads` threads.

    Raises:
        RuntimeUnavailableError: no such runtime, its library is not installed, or no threads.
    """
    if name not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"unknown runtime {name!r}{suggest(name, RUNTIMES)}; known: {', '.join(RUNTIMES)}"
        )
    if threads < 1:
        raise RuntimeUnavailableError(f"threads must be at least 1, got {threads}")
    module_name, class_name = RUNTIMES[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime {name!r} is not installed ({error}); pip install {name}"
        ) from error
    runtime: Runtime = getattr(module, class_name)(threads=threads)
    return runtime
