"""How much memory a call needs at its peak, by PyTorch's own allocators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from slimnas.analysis.recording import silent_profiler

_CPU = 0
"""The number of the CPU among the profiler's device types."""


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes `call` has allocated at its peak, beyond those allocated before it.

    What is counted is what PyTorch's allocator of `device` hands out. On the CPU, that leaves out
    what libraries such as oneDNN allocate for themselves.
    """
    return _on_cuda(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(call: Callable[[], object]) -> int:
    with (
        silent_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == _CPU
    ]
    if not found:
        return 0
    found.sort()
    _, first_total, first = found[0]
    peak: int = max(total for _, total, _ in found) - (first_total - first)
    return peak if peak > 0 else 0
