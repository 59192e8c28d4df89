"""Compute the feature columns of points.csv by tracing timm's models.

    python tools/trace_features.py FOLDER [...]

Every line of `points.csv` with a `model` gets its features from one forward pass of that timm
model at that resolution, reparametrised for inference where it can be, with batch normalisation
taken as folded and a distillation head as folded into the head. Needs timm (`pip install
slimnas[test]`).
"""

from __future__ import annotations

import csv
import io
import sys
from functools import reduce
from math import prod
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas._files import atomic_write_text
from slimnas.latency.device_model import (
    FEATURE_NAMES,
    LARGE_ATTENTION_QUERIES,
    Features,
    dense_layer,
)
from slimnas.latency.fit import POINT_COLUMNS, POINTS_FILE

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
        name = func._schema.name.removeprefix("aten::")
        first = result if isinstance(result, torch.Tensor) else result[0]
        self.found.append(operator_features(name, args, tuple(first.shape)))
        return result


def operator_features(name: str, args: tuple[Any, ...], out: tuple[int, ...]) -> Features:
    """Features of one ATen operator."""
    shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
    if name == "convolution":
        weight, stride, groups = shapes[1], args[3][0], args[8]
        traffic = prod(shapes[0]) + prod(out)
        if groups > 1:
            return Features(traffic_elements=traffic)
        patch = Features(patch_embeddings=int(weight[-1] >= 7 and stride >= 4))
        layer = dense_layer(prod(shapes[0]), prod(weight), prod(out), out[-1] * out[-2])
        return patch + layer
    if name in ("mm", "addmm"):
        left, right = shapes[-2:]
        return dense_layer(prod(left), prod(right), prod(out), left[0])
    if name == "bmm":
        return Features(traffic_elements=prod(shapes[0]) + prod(shapes[1]) + prod(out))
    if name in ("avg_pool2d", "max_pool2d_with_indices"):
        return Features(traffic_elements=2 * prod(out))
    if name == "_softmax":
        large = prod(out) if out[-2] > LARGE_ATTENTION_QUERIES else 0
        return Features(dynamic_norms=1, large_attention_elements=large)
    return Features(dynamic_norms=int(name in ("native_layer_norm", "native_group_norm")))


def trace(module: torch.nn.Module, shape: tuple[int, ...]) -> Features:
    """Features of one forward pass in eval mode."""
    module.eval()
    inputs = torch.zeros(shape)
    with torch.no_grad():
        module(inputs)  # attention biases are cached on the first pass
        with Tracer() as tracer:
            module(inputs)
    return reduce(add, tracer.found, Features())


def model_features(model: str, resolution: int) -> Features:
    """Features of a timm model, or of `ATTENTION_STEP`."""
    import timm
    from timm.layers import set_fused_attn
    from timm.models.efficientformer_v2 import Attention2d
    from timm.utils.model import reparameterize_model

    set_fused_attn(False)
    if model == ATTENTION_STEP:
        step = trace(Attention2d(160, resolution=14), (1, 160, 14, 14))
        return step + step
    network = reparameterize_model(timm.create_model(model))
    if hasattr(network, "head_dist"):
        network.head_dist = torch.nn.Identity()
        network.head_dist.forward = lambda features: torch.zeros(1, 1000)
    return Features(networks=1) + trace(network, (1, 3, resolution, resolution))


def fill(folder: Path) -> None:
    """Write the features of every model of one folder's points."""
    path = folder / POINTS_FILE
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
    for row in rows:
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
