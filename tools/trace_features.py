"""Compute the feature columns of points.csv by tracing timm's models.

    python tools/trace_features.py FOLDER [...]

Every line of `points.csv` with a `model` gets its features from one forward pass of that timm
model at that resolution, reparametrised for inference where it can be, with batch normalisation
taken as folded and a distillation head as folded into the head. A model called `pytorchcv:NAME`
is that package's. Needs timm (`pip install slimnas[test]`), and pytorchcv where it is named.
"""

from __future__ import annotations

import csv
import io
import sys
from functools import cache, reduce
from math import prod
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas._files import atomic_write_text
from slimnas.latency.features import (
    FEATURE_NAMES,
    Features,
    attention_product,
    dense_layer,
    dynamic_norm,
    pooling,
    softmax,
)
from slimnas.latency.points import POINT_COLUMNS, POINTS_FILE

ACTIVATIONS = frozenset(
    ("gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh", "elu", "mish")
)
"""What needs more than a comparison per element. In-place variants have the same name and `_`."""

ATTENTION_STEP = "2 x efficientformer_v2.Attention2d(160, 14x14)"
"""Two full-resolution attention blocks of EfficientFormerV2. Their number and width follow from
the step's published growth: 0.85 M parameters and 0.27 GMACs."""


class Tracer(TorchDispatchMode):
    """Collects the features of every operator that runs inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Features] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(first, torch.Tensor):
            self.found.append(operator_features(name, args, tuple(first.shape)))
        return result


def operator_features(name: str, args: tuple[Any, ...], out: tuple[int, ...]) -> Features:
    """Features of one ATen operator."""
    shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
    if name == "convolution":
        return _convolution(args, shapes, out)
    if name in ("mm", "addmm"):
        left, right = shapes[-2:]
        return dense_layer(prod(left), prod(right), prod(out), left[0], kernel=1)
    if name in ("bmm", "baddbmm"):
        left, right = shapes[-2:]
        return attention_product(prod(left), prod(right), prod(out), prod(left) * right[-1])
    if name in ("avg_pool2d", "max_pool2d_with_indices"):
        return pooling(prod(out))
    if name == "_softmax":
        return softmax(prod(out), out[-2])
    if name in ("native_layer_norm", "native_group_norm"):
        return dynamic_norm(prod(out))
    if name in ACTIVATIONS:
        return Features(activation_elements=prod(out))
    if name in ("roll", "cat") or _reorders(name, args, out):
        return Features(reshaped_elements=prod(out))
    return Features()


def _convolution(
    args: tuple[Any, ...], shapes: list[tuple[int, ...]], out: tuple[int, ...]
) -> Features:
    weight, stride, groups = shapes[1], args[3][0], args[8]
    positions, inputs, outputs = out[-1] * out[-2], prod(shapes[0]), prod(out)
    if groups > 1:
        return Features(
            traffic_elements=inputs + outputs,
            grouped_macs=prod(weight) * positions,
            weights=prod(weight),
            operators=1,
        )
    patch = Features(patch_embeddings=int(weight[-1] >= 7 and stride >= 4))
    return patch + dense_layer(inputs, prod(weight), outputs, positions, kernel=weight[-1])


def _reorders(name: str, args: tuple[Any, ...], out: tuple[int, ...]) -> bool:
    """Whether elements move: a permutation of maps, heads or windows.

    A map and its tokens are one array read two ways, and the last two dimensions swap inside a
    matrix product.
    """
    if name == "transpose":
        swapped = {axis % len(out) for axis in args[1:3]}
        return len(out) > 3 and swapped != {len(out) - 2, len(out) - 1}
    return name == "permute" and len(out) > 3


def trace(module: torch.nn.Module, shape: tuple[int, ...]) -> Features:
    """Features of one forward pass in eval mode."""
    module.eval()
    inputs = torch.zeros(shape)
    with torch.no_grad():
        module(inputs)  # attention biases are cached on the first pass
        with Tracer() as tracer:
            module(inputs)
    return reduce(add, tracer.found, Features())


@cache
def model_features(model: str, resolution: int) -> Features:
    """Features of a timm model, of `pytorchcv:NAME`, or of `ATTENTION_STEP`."""
    import timm
    from timm.layers import set_fused_attn
    from timm.models.efficientformer_v2 import Attention2d
    from timm.utils.model import reparameterize_model

    set_fused_attn(False)
    if model == ATTENTION_STEP:
        step = trace(Attention2d(160, resolution=14), (1, 160, 14, 14))
        return step + step
    package, _, name = model.rpartition(":")
    if package:
        from pytorchcv.model_provider import get_model

        network = get_model(name)
    else:
        network = reparameterize_model(timm.create_model(name))
    if hasattr(network, "head_dist"):
        network.head_dist = torch.nn.Identity()
        network.head_dist.forward = lambda features: torch.zeros(1, 1000)
    return Features(networks=1) + trace(network, (1, 3, resolution, resolution))


def fill(folder: Path) -> None:
    """Write the features of every model of one folder's points."""
    path = folder / POINTS_FILE
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
    for row in rows:
        row.setdefault("weight", "1")
        if row["model"]:
            features = model_features(row["model"], int(row["resolution"]))
            row.update(zip(FEATURE_NAMES, map(str, features.counts), strict=True))
            sys.stdout.write(f"{folder.name}: {row['name']}\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, POINT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


if __name__ == "__main__":
    for given in sys.argv[1:]:
        fill(Path(given))
