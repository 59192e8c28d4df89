"""A network under PyTorch's profiler: self time of every operator, by place."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

from slimnas.analysis.attention_maps import FUSED, attention_weights
from slimnas.analysis.operators import Operator, of_aten
from slimnas.analysis.places import OUTSIDE, Place, entering
from slimnas.analysis.recording import Cell, ProfileSettings, Recording, silent_profiler
from slimnas.analysis.traffic import Key, Traffic, count_traffic
from slimnas.nn.build import Network
from slimnas.runtimes.torch_device import exact_kernels
from slimnas.runtimes.torch_runtime import DTYPES

RUN = "slimnas run"
PLACE = "slimnas place "
"""Names of the ranges that the profiler is told about."""


def profile_torch(network: Network, images: Tensor, settings: ProfileSettings) -> Recording:
    """Run `network` under the profiler.

    On the CPU the time of an operator is the time spent in it and in none of the operators it
    calls; on CUDA it is that of the kernels it starts.

    Args:
        network: in evaluation mode; it is moved to the device and the number format.
        images: a batch in fp32 on the CPU.
        settings: how; `runtime` is not looked at.
    """
    cuda = settings.device == "cuda"
    dtype = DTYPES[settings.dtype]
    network.to(settings.device, dtype)
    images = images.to(settings.device, dtype)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _conditions(settings):
        traffic = count_traffic(network, images)
        with torch.inference_mode():
            for _ in range(settings.warm_up):
                network(images)
            forward_ms = [_timed_ms(network, images, cuda) for _ in range(settings.iterations)]
            ranges = _Ranges()
            with (
                entering(network, ranges.enter, ranges.leave),
                profile(activities=activities) as found,
            ):
                for _ in range(settings.iterations + 1):  # the first pays for the profiler's start
                    with record_function(RUN):
                        network(images)
                        _wait(cuda)
    names = {place.name: place for place, _ in traffic}
    names |= {place.name: place for place in ranges.seen}
    cells = _cells(_samples(found.events() or (), names), traffic, settings.iterations)
    unit = torch.cuda.get_device_name() if cuda else "cpu"
    return Recording(cells, tuple(forward_ms), str(torch.__version__), unit)


@dataclass(frozen=True)
class _Sample:
    """One event: an operator, or a part of one."""

    run: int
    key: Key
    ms: float
    is_call: bool


@dataclass(frozen=True)
class _Context:
    """What is around an event."""

    run: int = 0
    place: Place = OUTSIDE
    operator: Operator | None = None


class _Ranges:
    """Tells the profiler which place is entered."""

    def __init__(self) -> None:
        self.seen: set[Place] = set()
        self._open: list[record_function] = []

    def enter(self, place: Place) -> None:
        self.seen.add(place)
        opened = record_function(PLACE + place.name)
        opened.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(opened)

    def leave(self, _: Place) -> None:
        self._open.pop().__exit__(None, None, None)


def _samples(events: Iterable[Any], places: dict[str, Place]) -> Iterator[_Sample]:
    """Every operator's own time; events come with those around them before those inside."""
    around: dict[int, _Context] = {}
    runs = 0
    for event in events:
        if event.device_type.name != "CPU" or event.is_async:
            continue
        outer = around.get(id(event.cpu_parent), _Context())
        operator = of_aten(event.name)
        if event.name == RUN:
            runs += 1
            here = _Context(run=runs)
        elif event.name.startswith(PLACE):
            here = _Context(outer.run, places[event.name.removeprefix(PLACE)])
        else:
            here = _Context(outer.run, outer.place, operator or outer.operator)
        around[id(event)] = here
        if here.operator is None or not here.run:
            continue
        if event.use_device == "cuda":
            ms = sum(kernel.duration for kernel in event.kernels) / 1e3
        else:
            ms = event.self_cpu_time_total / 1e3
        key = (here.place, here.operator)
        yield _Sample(here.run, key, ms, is_call=here.operator != outer.operator)


def _cells(samples: Iterable[_Sample], traffic: Any, iterations: int) -> tuple[Cell, ...]:
    times: dict[Key, list[float]] = defaultdict(lambda: [0.0] * iterations)
    calls: Counter[Key] = Counter()
    for sample in samples:
        if sample.run > 1:
            times[sample.key][sample.run - 2] += sample.ms
            calls[sample.key] += sample.is_call
    for key in traffic:  # work is not lost where the profiler calls it by another name
        times[key]
    return tuple(
        Cell(
            place=key[0],
            operator=key[1],
            calls=calls[key] // iterations,
            times_ms=tuple(mine),
            macs=traffic.get(key, Traffic()).macs,
            bytes=traffic.get(key, Traffic()).bytes,
        )
        for key, mine in times.items()
    )


@contextlib.contextmanager
def _conditions(settings: ProfileSettings) -> Iterator[None]:
    """The number of threads and the kernels asked for; the caller's are restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(silent_profiler())
            stack.enter_context(exact_kernels())
            if settings.attention == "explicit":
                stack.enter_context(_Explicit())
            yield
    finally:
        torch.set_num_threads(before)


class _Explicit(TorchFunctionMode):
    """Attention as products, softmax and products; torch's own such form also looks for rows of
    nothing but masked tokens, which costs as much as the softmax.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != FUSED:
            return func(*args, **(kwargs or {}))
        value = args[2] if len(args) > 2 else kwargs["value"]
        return attention_weights(*args, **(kwargs or {})) @ value


def _timed_ms(network: Network, images: Tensor, cuda: bool) -> float:
    start = time.perf_counter()
    network(images)
    _wait(cuda)
    return 1e3 * (time.perf_counter() - start)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
