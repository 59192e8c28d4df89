"""The attention study: speed and memory of mechanisms as single layers, beside the published ones.

The protocol is that of `Rounds`: evaluation mode without gradients, warm-up, all mechanisms
interleaved. Before anything is timed, the outputs of every layer are compared with its own in
double precision.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimnas.analysis.attention_study import AttentionStudy, LayerRow, LeftOut, StudyResult
from slimnas.analysis.interleaved import Progress, time_interleaved
from slimnas.analysis.mechanisms import (
    MECHANISMS,
    Layer,
    Mechanism,
    layer_cost,
    make_layer,
    on_maps,
)
from slimnas.analysis.peak import peak_bytes
from slimnas.arch.shapes import FeatureShape
from slimnas.errors import AnalysisError
from slimnas.measure.machine import pinned, this_machine
from slimnas.nn.fold import fold
from slimnas.nn.layout import to_map, to_tokens
from slimnas.nn.seeding import seeded
from slimnas.runtimes.base import Runtime, Session, bound, clock_of
from slimnas.runtimes.registry import get_runtime

TOLERANCE = 1e-3
"""Largest difference from double precision, as a share of the largest output."""


@dataclass(frozen=True)
class _Ready:
    """A layer that passed its check and may be timed.

    Attributes:
        session: runs it.
        x: its input.
        difference: from double precision, as a share of the largest output.
        memory: peak bytes without and with the backward pass; none where not measured.
    """

    session: Session
    x: Tensor
    difference: float
    memory: tuple[int, int] | None


def run_study(study: AttentionStudy, *, progress: Progress | None = None) -> StudyResult:
    """Time every mechanism of `study` on every map it can work on.

    Raises:
        AnalysisError: none can work on any map, or a layer computes something else than it should.
        RuntimeUnavailableError: the runtime or the device is not there.
    """
    runtime = get_runtime(study.runtime, threads=study.threads, unit=study.device)
    rows: list[LayerRow] = []
    left_out: list[LeftOut] = []
    with pinned(study.threads), _kernels(study), seeded(study.seed):
        for side in study.resolutions:
            shape = FeatureShape(study.width, side, side)
            entrants = []
            for mechanism in MECHANISMS.values():
                if mechanism.name not in study.mechanisms:
                    continue
                reason = _reason_against(mechanism, shape, study)
                if reason is None:
                    entrants.append(mechanism)
                else:
                    left_out.append(LeftOut(mechanism.name, side, reason))
            if entrants:
                rows += _time_map(entrants, shape, study, runtime, progress)
    if not rows:
        first = left_out[0]
        raise AnalysisError(f"{first.mechanism} on {first.side}x{first.side}: {first.reason}")
    return StudyResult(
        study=study,
        rows=tuple(rows),
        left_out=tuple(left_out),
        machine=this_machine(),
        runtime=(runtime.name, runtime.version),
        compute_unit=runtime.compute_unit,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _time_map(
    entrants: Sequence[Mechanism],
    shape: FeatureShape,
    study: AttentionStudy,
    runtime: Runtime,
    progress: Progress | None,
) -> list[LayerRow]:
    """Make, check and time the layers of all mechanisms on maps of one shape."""
    generator = torch.Generator().manual_seed(study.seed)
    tokens = torch.randn(study.batch, shape.positions, study.width, generator=generator)
    where = f"{shape.height}x{shape.width}"
    layers: list[list[_Ready]] = []
    for number, mechanism in enumerate(entrants):
        if progress is not None:
            progress(number, len(entrants), f"checking {mechanism.name} on {where}")
        specs = mechanism.specs(study.width, study.heads)
        layers.append([_prepare(spec, shape, tokens, study, runtime) for spec in specs])
    samples = iter(
        time_interleaved(
            [bound(one.session, one.x.numpy()) for own in layers for one in own],
            study.how,
            clock=time.thread_time if study.clock == "cpu" else clock_of(runtime),
            rng=random.Random(f"{study.seed} {where}"),
            progress=None if progress is None else partial(_at, progress, where),
        )
    )
    return [
        _row(mechanism, own, [next(samples) for _ in own], shape, study)
        for mechanism, own in zip(entrants, layers, strict=True)
    ]


def _row(
    mechanism: Mechanism,
    layers: Sequence[_Ready],
    rounds_ms: Sequence[tuple[float, ...]],
    shape: FeatureShape,
    study: AttentionStudy,
) -> LayerRow:
    """One row of a mechanism's layers, means where there are several."""
    cost = mechanism.cost(shape, study.heads)
    memory = [layer.memory for layer in layers if layer.memory is not None]
    means = [sum(each) // len(each) for each in zip(*memory, strict=True)]
    return LayerRow(
        mechanism=mechanism,
        side=shape.height,
        params=cost.params,
        macs=cost.macs,
        rounds_ms=tuple(sum(each) / len(each) for each in zip(*rounds_ms, strict=True)),
        difference=max(layer.difference for layer in layers),
        test_bytes=means[0] if means else None,
        train_bytes=means[1] if means else None,
    )


class _OnTokens(nn.Module):
    """A mixer of maps that takes and gives tokens."""

    def __init__(self, mixer: nn.Module, shape: FeatureShape) -> None:
        super().__init__()
        self.mixer, self.shape = mixer, shape

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.mixer(to_map(x, self.shape)))


def _prepare(
    spec: Layer, shape: FeatureShape, tokens: Tensor, study: AttentionStudy, runtime: Runtime
) -> _Ready:
    """Make a layer, load it, check what it computes and measure its memory."""
    module, x = _stirred(make_layer(spec, shape)), tokens
    if on_maps(spec):
        if study.layout == "own":
            x = to_map(tokens, shape).contiguous()
        else:
            module = _OnTokens(module, shape)
    folded = fold(module)
    session = runtime.load(folded, x)
    difference = _checked(spec, shape, module, session, x)
    memory = None
    if study.memory and study.runtime == "torch":
        device = torch.device(study.device)
        memory = _peaks(module.to(device), folded.to(device), x.to(device))
    return _Ready(session, x, difference, memory)


def _stirred(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and factors of its own: fresh ones may silence a layer."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
            assert part.running_mean is not None
            assert part.running_var is not None
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module


def _checked(
    spec: Layer, shape: FeatureShape, module: nn.Module, session: Session, x: Tensor
) -> float:
    """Compare a session with the module in double precision, and its size with the closed form.

    Raises:
        AnalysisError: they differ.
    """
    params = sum(parameter.numel() for parameter in module.parameters())
    if params != layer_cost(spec, shape).params:
        raise AnalysisError(
            f"{spec.type}: the layer must have {layer_cost(spec, shape).params} parameters, has "
            f"{params}; please report this"
        )
    few = min(2, x.shape[0])
    exact = copy.deepcopy(module).double().eval()
    with torch.inference_mode():
        expected = exact(x[:few].double())
    got = torch.from_numpy(session.run(x.numpy()))[:few].double()
    largest = float(expected.abs().max())
    difference = float((got - expected).abs().max()) / max(largest, 1e-12)
    if not difference <= TOLERANCE:
        raise AnalysisError(
            f"{spec.type}: the layer must compute what it does in double precision, differs by "
            f"{difference:.2g} of its largest output; nothing was timed"
        )
    return difference


def _peaks(module: nn.Module, folded: nn.Module, x: Tensor) -> tuple[int, int]:
    """Peak bytes of a call without gradients, and of one with the backward pass."""
    given = sum(_bytes(tensor) for tensor in (*module.parameters(), x))
    inner = x.detach().clone().requires_grad_()
    module.train()

    def test() -> None:
        with torch.inference_mode():
            folded(x)

    def train() -> None:
        module(inner).sum().backward()

    peaks = []
    for call in (test, train):
        call()  # what is allocated once and kept is no part of a call
        module.zero_grad(set_to_none=True)
        inner.grad = None
        peaks.append(given + peak_bytes(call, x.device))
    module.zero_grad(set_to_none=True)
    return peaks[0], peaks[1]


def _reason_against(mechanism: Mechanism, shape: FeatureShape, study: AttentionStudy) -> str | None:
    """Why a mechanism is not timed on a map; None if it is."""
    reason = mechanism.refusal(shape, study.heads)
    fused = study.fused and study.runtime == "torch"
    if reason is not None or fused:
        return reason
    needed = study.batch * mechanism.cost(shape, study.heads).activation_bytes
    there = _memory_bytes(study.device)
    if there is None or needed <= there / 2:
        return None
    return (
        f"needs about {needed / 2**30:.0f} GiB for a batch of {study.batch} without fused "
        f"kernels, of {there / 2**30:.0f} GiB; choose a smaller batch"
    )


def _memory_bytes(device: str) -> int | None:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):  # not on every system
        return None


@contextlib.contextmanager
def _kernels(study: AttentionStudy) -> Iterator[None]:
    """Leave PyTorch its fused attention kernels, or keep it to products and softmax."""
    if study.fused:
        yield
    else:
        with sdpa_kernel(SDPBackend.MATH):
            yield


def _at(progress: Progress, where: str, done: int, planned: int, what: str) -> None:
    progress(done, planned, f"{what} on {where}")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
