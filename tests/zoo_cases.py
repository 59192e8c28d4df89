"""A tiny network with weights, and folders that hold it, for the tests of the zoo."""

from __future__ import annotations

from pathlib import Path

import torch

from slimnas.arch.architecture import Architecture
from slimnas.nn.build import Network, build
from slimnas.zoo.entry import save_model
from slimnas.zoo.metrics import Metric

METRICS = {"digits_top1": Metric(0.97, "slimnas evaluate, 360 test images")}
TINY = Architecture.from_dict(
    {
        "schema": "slimnas/architecture/1",
        "name": "tiny",
        "input": {"resolution": 32},
        "stem": {"type": "conv_stem", "width": 4},
        "stages": [
            {"width": 4, "blocks": [{"type": "mb4d"}]},
            {
                "width": 6,
                "downsample": {"type": "conv3x3"},
                "blocks": [{"type": "mb3d", "heads": 2, "qk_dim": 3, "v_dim": 4}],
            },
        ],
        "head": {"type": "linear", "classes": 10, "distilled": True},
        "provenance": {"source": "made in a test"},
    }
)


def trained(seed: int = 0) -> Network:
    network = build(TINY, seed=seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    return network.eval()


def save_run(folder: Path) -> Path:
    """What a search leaves of a network it found."""
    save_model(folder, architecture=TINY, weights=trained().state_dict(), metrics=METRICS)
    return folder
