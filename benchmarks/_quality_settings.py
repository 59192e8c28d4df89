"""What is compared and how: the options of the command line, and those of --quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimnas.train.recipe import TrainRecipe

QUICK_SPACE = """schema: slimnas/search-space/1
name: quick
input: {channels: 3, resolution: 64}
stem: {type: conv_stem, act: relu}
stages:
- {width: {min: 16, max: 16, step: 16}, slots: 3, choices: [mb4d, identity]}
- width: {min: 32, max: 32, step: 16}
  slots: 3
  choices: [mb4d, identity]
  downsample: {type: conv3x3}
- width: {min: 32, max: 48, step: 16}
  slots: 3
  choices: [mb4d, identity]
  downsample: {type: conv3x3}
- width: {min: 64, max: 80, step: 16}
  slots: 3
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 1000}
blocks:
  mb4d: {ffn_ratio: 4}
  mb3d: {heads: 2, qk_dim: 8, v_dim: 16, ffn_ratio: 4}
supernet: {resolution: 32}
"""
QUICK: dict[str, Any] = {
    "space": "quick",
    "data": "digits",
    "shares": (0.8, 0.6, 0.5),
    "supernet_epochs": 2,
    "epochs": 2,
    "max_images": 600,
    "search_images": 60,
    "random": 2,
}


QUICK_TABLE = ("--rounds", "2", "--precision", "50", "--networks", "4", "--held-out", "2")


@dataclass(frozen=True)
class Settings:
    """What is compared and how; the options of the command line."""

    space: str
    data: str
    backend: str
    threads: int
    clock: str
    deploy: int | None
    resolution: int | None
    max_images: int | None
    final_images: int | None
    search_images: int
    supernet_epochs: int
    epochs: int
    batch_size: int
    lr: float
    layer_scale: float
    seeds: int
    seed: int
    random: int
    shares: tuple[float, ...]
    targets: tuple[float, ...]
    train_on: str
    measure: bool
    quick: bool

    @property
    def recipe(self) -> TrainRecipe:
        """How every network is trained."""
        return TrainRecipe(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, channels_last=True
        )
