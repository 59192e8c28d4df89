"""Sees the attention maps and head outputs of any network, without its modules' help.

While a `MapTracer` is open, it watches the calls that every attention is made of: a softmax over
the last axis gives a map, the first product after it gives what the heads make of it, and
`scaled_dot_product_attention` is both. Networks run at full speed when no tracer is open.

Shapes: B images, H heads, F numbers of one head's map or output in one image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimnas.errors import AnalysisError

PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"))
SOFTMAX = "softmax"
FUSED = "scaled_dot_product_attention"
PASSED_THROUGH = (nn.Softmax, nn.Dropout, nn.Identity)
"""Modules that may hold a step of an attention; it belongs to the module around them."""


@dataclass(frozen=True)
class HeadMaps:
    """Heads of one attention that see the same tokens.

    Attributes:
        module: name of the attention module.
        branch: number of this group of heads in the module, in the order they are computed.
        maps: attention maps (B, H, F), of all windows side by side.
        outputs: what the heads made of the values (B, H, F); None if that was not seen.
    """

    module: str
    branch: int
    maps: Tensor
    outputs: Tensor | None


@dataclass(eq=False)
class _Call:
    """One softmax and the product after it."""

    maps: Tensor
    output: Tensor | None = None


@dataclass
class _Visit:
    """A module that is running."""

    name: str
    module: nn.Module
    calls: list[_Call] = field(default_factory=list)


class MapTracer(TorchFunctionMode):
    """Calls `sink` with the heads of every attention that runs while it is open.

    Args:
        images: images per batch B.
        sink: takes the heads of one module, as soon as the module has run.
    """

    def __init__(self, images: int, sink: Callable[[HeadMaps], None]) -> None:
        super().__init__()
        self._images, self._sink = images, sink
        self._visits: list[_Visit] = []
        self._sinking = False

    @contextlib.contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Be open for runs of `network`."""
        with contextlib.ExitStack() as hooks:
            for name, module in network.named_modules():
                if isinstance(module, PASSED_THROUGH):
                    continue

                def enter(module: nn.Module, _: Any, name: str = name) -> None:
                    self._visits.append(_Visit(name, module))

                def leave(*_: Any) -> None:
                    self._leave()

                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            with self:
                yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._visits or self._sinking:
            return out
        calls = self._visits[-1].calls
        name = getattr(func, "__name__", "")
        if name == FUSED:
            calls.append(_Call(attention_weights(*args, **kwargs), out))
        elif name == SOFTMAX and _over_last(out, args, kwargs):
            calls.append(_Call(out))
        elif name in PRODUCTS and calls and calls[-1].output is None:
            calls[-1].output = out
        return out

    def _leave(self) -> None:
        visit = self._visits.pop()
        self._sinking = True
        try:
            for number, (maps, outputs) in enumerate(_groups(visit, self._images)):
                self._sink(HeadMaps(visit.name, number, maps, outputs))
        finally:
            self._sinking = False


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """The map that `scaled_dot_product_attention` of the same arguments does not give."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1)


def _over_last(out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return out.dim() >= 3 and dim in (-1, out.dim() - 1)


def _groups(visit: _Visit, images: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The calls of one module as maps and outputs (B, H, F).

    Several calls of one head each are the heads of one group, in order; any other call holds all
    heads of a group.
    """
    single = [call for call in visit.calls if call.maps.dim() == 3]
    if len(single) > 1:
        heads = [_by_head(visit, call.maps, images, 1) for call in single]
        outputs = [_by_head(visit, call.output, images, 1) for call in single]
        whole = [output for output in outputs if output is not None]
        joined = torch.cat(whole, dim=1) if len(whole) == len(single) else None
        yield torch.cat([maps for maps in heads if maps is not None], dim=1), joined
    known = _heads_of(visit.module)
    for call in visit.calls:
        if call in single and len(single) > 1:
            continue
        maps = _by_head(visit, call.maps, images, known)
        output = _by_head(visit, call.output, images, known)
        if maps is not None:
            alike = output is not None and output.shape[1] == maps.shape[1]
            yield maps, output if alike else None


def _heads_of(module: nn.Module) -> int | None:
    """How many heads a module says it has: its `heads`, or that one's `count`."""
    heads = getattr(module, "heads", None)
    count = getattr(heads, "count", heads)
    return count if isinstance(count, int) else None


def _by_head(visit: _Visit, x: Tensor | None, images: int, heads: int | None) -> Tensor | None:
    """Maps or outputs of all heads as (B, H, F), all windows of an image side by side.

    Takes (windows, H, N, M), also with several windows' heads one after another in H; and, where
    heads have no axis of their own, (B, H * N, M) or (windows * H, N, M). Images come before
    their windows, and these before their heads.

    Raises:
        AnalysisError: the tensor is not one of so many images.
    """
    if x is None:
        return None
    if x.shape[:-2].numel() % images:
        raise AnalysisError(
            f"{visit.name}: {type(visit.module).__name__} gives attention maps "
            f"{tuple(x.shape)}, which are not those of {images} images; it must put images first"
        )
    if x.dim() == 3:
        heads = heads or 1
        if x.shape[0] == images:
            return x.reshape(images, heads, -1)
    elif heads is None or x.shape[-3] % heads:
        heads = x.shape[-3]
    windows = x.shape[:-2].numel() // images // heads
    return x.reshape(images, windows, heads, -1).transpose(1, 2).flatten(2)
