"""Torch-Pruning on timm's DeiT-T, patched so that it runs: the peer's arms of pruning_deit.py.

What Torch-Pruning lacks for this comparison is supplied here, in its favour:

    attention             timm's forward, reshaped by the live widths, and the softmax scale of the
                          unpruned network kept (its own code path would change the scale)
    target                it knows channel ratios only; the ratio is searched for the MACs
    fresh arguments       its mutable defaults would carry layers from one pruner to the next
    second order          its `accumulate_grad` keeps the last image alone; here the mean over all
                          images of the squared gradient of one image

Importance of the first order sees the summed gradients of the minibatches' mean losses, as in its
own examples. `ranking` is its way to compare groups: "global", "local" (every layer the same
ratio) or "isomorphic" (global among groups of the same structure). But for "whole network" only
head dims and MLP hidden channels may go. Weights are sliced, not trained.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from safetensors.torch import load_file
from timm_import import let_timm_import
from torch import Tensor, nn

Criterion = Literal["taylor", "taylor_multivariable", "taylor_raw", "hessian", "l2", "random"]
Ranking = Literal["global", "local", "isomorphic"]

SIDE = 224
HEADS = 3
SCALE = 64**-0.5
"""Of the unpruned attention."""
GRID, HALVINGS = 50, 10
"""Ratios tried upwards until one fits, then halvings towards the least that fits: 2e-5, less than
one channel of the 13 824 that a global ranking ranks at most."""


@dataclass(frozen=True)
class Arm:
    """A way to prune."""

    criterion: Criterion
    ranking: Ranking
    whole: bool = False
    """The embedding may go too."""


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "tp: taylor global": Arm("taylor", "global"),
        "tp: taylor local": Arm("taylor", "local"),
        "tp: taylor isomorphic": Arm("taylor", "isomorphic"),
        "tp: taylor multivariable global": Arm("taylor_multivariable", "global"),
        "tp: taylor raw sum global": Arm("taylor_raw", "global"),
        "tp: hessian (fixed) global": Arm("hessian", "global"),
        "tp: l2 global": Arm("l2", "global"),
        "tp: random global": Arm("random", "global"),
        "tp: taylor global, whole network": Arm("taylor", "global", whole=True),
    }
)


class UnreachableError(Exception):
    """No ratio brings the network to the MACs asked for."""


@dataclass(frozen=True)
class _Calibration:
    """Weights and images, equal by content."""

    weights: Path
    digest: str
    batches: Sequence[tuple[Tensor, Tensor]] = field(compare=False)


@dataclass(frozen=True)
class _Gradients:
    """By name of the parameter."""

    first: dict[str, Tensor]
    """Sum over minibatches of the gradient of the mean loss."""
    second: dict[str, Tensor]
    """Mean over images of the squared gradient of an image's loss."""


def available() -> bool:
    """Whether Torch-Pruning and timm are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch_pruning", "timm"))


def prune_to(
    arm: str, weights: Path, batches: Sequence[tuple[Tensor, Tensor]], macs: float, seed: int
) -> tuple[nn.Module, float]:
    """DeiT-T pruned to at most `macs`, as close to it as the arm gets, and its true MACs.

    Args:
        arm: A name of `ARMS`.
        weights: DeiT-T in timm's layout, safetensors.
        batches: Minibatches to calibrate on: images (B, 3, 224, 224), labels (B,).
        macs: Upper bound on multiply-adds of one image, attention products among them.
        seed: Of random importance; the other criteria do not use it.

    Returns:
        timm's network in eval mode, its attention's forward replaced.

    Raises:
        UnreachableError: No ratio leads to so few MACs.
    """
    way = ARMS[arm]
    network = _load(weights)
    gradients: dict[str, Tensor] = {}
    if way.criterion not in ("l2", "random"):
        found = _gradients(_Calibration(weights, _digest(batches), batches))
        gradients = found.second if way.criterion == "hessian" else found.first
    probe = partial(_pruned, network, way, gradients, seed=seed)
    low, high, best, least = 0.0, 1.0, None, math.inf
    for step in range(1, GRID):
        candidate = probe(step / GRID)
        least = min(least, network_macs(candidate))
        if network_macs(candidate) <= macs:
            low, high, best = (step - 1) / GRID, step / GRID, candidate
            break
    if best is None:
        raise UnreachableError(
            f"{arm} must come down to {macs / 1e6:.1f} MMACs, but at every ratio up to "
            f"{(GRID - 1) / GRID:g} it keeps {least / 1e6:.1f} MMACs or more; ask for more MACs"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        candidate = probe(middle)
        if network_macs(candidate) > macs:
            low = middle
        else:
            high = middle
            if network_macs(candidate) >= network_macs(best):
                best = candidate
    return best.requires_grad_(False), float(network_macs(best))


def network_macs(network: nn.Module) -> int:
    """Multiply-adds of one image of 224 pixels, from the widths the network has now.

    The patch embedding, all linear maps, both products of attention, and the head on one token.
    """
    parts: Any = network
    patch: nn.Conv2d = parts.patch_embed.proj
    patches = (SIDE // patch.kernel_size[0]) ** 2
    tokens = patches + 1
    total = patches * patch.weight.numel() + parts.head.weight.numel()
    for block in parts.blocks:
        maps = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        total += tokens * sum(linear.weight.numel() for linear in maps)
        total += tokens**2 * 2 * block.attn.proj.in_features
    return int(total)


def _load(weights: Path) -> nn.Module:
    let_timm_import()
    import timm

    network: nn.Module = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    network.load_state_dict(load_file(weights))
    return network.eval()


def _digest(batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    digest = hashlib.blake2b()
    for images, labels in batches:
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.contiguous().numpy().data)
        digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=1)  # the arms and budgets of a seed come one after another
def _gradients(calibration: _Calibration) -> _Gradients:
    """Both kinds from one pass, image by image."""
    network = _load(calibration.weights)
    named = dict(network.named_parameters())
    first = {name: torch.zeros_like(value) for name, value in named.items()}
    second = {name: torch.zeros_like(value) for name, value in named.items()}
    count = sum(len(labels) for _, labels in calibration.batches)
    for images, labels in calibration.batches:
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            loss = F.cross_entropy(network(image), label)
            found = torch.autograd.grad(loss, list(named.values()))
            for name, gradient in zip(named, found, strict=True):
                first[name].add_(gradient, alpha=1 / len(labels))
                second[name].addcmul_(gradient, gradient, value=1 / count)
    return _Gradients(first, second)


def _pruned(
    network: nn.Module, arm: Arm, gradients: Mapping[str, Tensor], ratio: float, *, seed: int
) -> nn.Module:
    """A copy with that ratio of channels removed."""
    import torch_pruning as tp

    copied: Any = copy.deepcopy(network)
    for block in copied.blocks:
        block.attn.forward = partial(_attention, block.attn)
    for name, parameter in copied.named_parameters():
        parameter.grad = gradients[name].clone() if gradients else None
    kept = [copied.head]
    if not arm.whole:
        kept.append(copied.patch_embed.proj)
        kept += [linear for block in copied.blocks for linear in (block.attn.proj, block.mlp.fc2)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the class token and position embedding
        torch.manual_seed(seed)
        tp.pruner.BasePruner(
            copied,
            torch.zeros(1, 3, SIDE, SIDE),
            importance=_importance(arm.criterion),
            pruning_ratio=ratio,
            global_pruning=arm.ranking != "local",
            isomorphic=arm.ranking == "isomorphic",
            ignored_layers=kept,
            num_heads={block.attn.qkv: HEADS for block in copied.blocks},
            prune_head_dims=True,
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
        ).step()
    copied.zero_grad(set_to_none=True)
    pruned: nn.Module = copied.eval()
    return pruned


def _importance(criterion: Criterion) -> Any:
    """Torch-Pruning's; gradients are the parameters' own `grad`."""
    from torch_pruning import importance as tp

    return {
        "taylor": tp.GroupTaylorImportance,
        "taylor_multivariable": partial(tp.GroupTaylorImportance, multivariable=True),
        "taylor_raw": partial(tp.GroupTaylorImportance, group_reduction="sum", normalizer=None),
        # It squares nothing itself: without `accumulate_grad` it takes `grad` for the squares.
        "hessian": tp.GroupHessianImportance,
        "l2": partial(tp.GroupMagnitudeImportance, p=2),
        "random": tp.RandomImportance,
    }[criterion]()


def _attention(self: Any, x: Tensor, **_: object) -> Tensor:
    batch, tokens, _width = x.shape
    dims = self.qkv.out_features // (3 * HEADS)
    qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, dims).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, HEADS * dims))
    return out
