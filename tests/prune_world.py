"""A working directory in which `slimnas prune` takes seconds: a tiny ViT for the digits."""

from __future__ import annotations

from pathlib import Path

import torch

from slimnas.arch.architecture import Architecture
from slimnas.nn.build import Network, build
from slimnas.prune.calibration import Calibration, DataRequest, open_calibration
from slimnas.prune.config import BudgetSpec, PruneConfig, claim
from slimnas.prune.measured import Meter
from slimnas.prune.pretrained import Start
from slimnas.prune.run import PruneResult, measure_result, run_prune
from slimnas.zoo.weights import save_weights

VIT = """schema: slimnas/architecture/1
name: mini
input: {channels: 1, resolution: 16}
stem: {type: vit_stem, width: 24, patch: 4}
stages:
- width: 24
  blocks:
  - {type: vit, heads: 3, qk_dim: 8, v_dim: 8, ffn_dim: 96, repeat: 2}
head: {type: token, classes: 10}
"""
ARCHITECTURE = Architecture.from_yaml(VIT)
PRUNE = ("prune", "--model", "mini.yaml", "--data", "digits", "--images", "60", "--prune-on", "cpu")


def lay_out(folder: Path, *, seed: int = 1) -> None:
    """Write `mini.yaml` and `mini.safetensors`."""
    (folder / "mini.yaml").write_text(VIT)
    save_weights(folder / "mini.safetensors", network(seed).state_dict(), ARCHITECTURE)


def network(seed: int = 1) -> Network:
    """The tiny ViT with weights large enough that every part matters."""
    made = build(ARCHITECTURE, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


class Events:
    """A listener that keeps what it is told, and may act at one moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def stage(self, name: str, done: int, total: int, state: str = "") -> None:
        self.seen.append((name, done, total))
        self.at(name, done)

    def at(self, name: str, done: int) -> None:
        """Overridden by those who act."""

    def of(self, name: str) -> list[int]:
        """How far a stage was, each time."""
        return [done for stage, done, _ in self.seen if stage == name]


def budget(asked: str, share: float) -> BudgetSpec:
    """A budget of MACs."""
    from slimnas.arch.cost import cost

    return BudgetSpec(kind="macs", limit=share * cost(ARCHITECTURE).macs, asked=asked)


def calibration(start: Network, images: int = 60) -> Calibration:
    """Digits at the model's resolution."""
    request = DataRequest(
        data="digits",
        test_data=None,
        images=images,
        labels="auto",
        normalisation=None,
        foreign=False,
        seed=0,
    )
    return open_calibration(request, start, "cpu")


def prune(
    folder: Path,
    *budgets: BudgetSpec,
    listener: Events | None = None,
    meter: Meter | None = None,
    **changes: object,
) -> PruneResult:
    """Run to the end in `folder`."""
    start = network()
    images = calibration(start)
    settings = {
        "model": "mini",
        "architecture_digest": ARCHITECTURE.digest,
        "weights": "auto",
        "weights_digest": "none",
        "data": "digits",
        "data_digest": images.digest,
        "test_digest": images.test_digest,
        "images": 60,
        "budgets": [one.model_dump() for one in budgets or (budget("70%", 0.7),)],
        **changes,
    }
    config = PruneConfig.model_validate(settings)
    claim(folder, config)
    listener = listener or Events()
    result = run_prune(
        config,
        Start(start, "mini", "made up", None),
        images,
        folder,
        listener=listener,
        prune_on="cpu",
    )
    return result if meter is None else measure_result(result, folder, meter, listener)
