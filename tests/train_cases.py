"""A small training task for the tests of the loop, and ways to stop it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ctrl_c import press_ctrl_c
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.data.batches import ImageSet, MemoryPixels, Split
from slimnas.train.checkpoint import TrainState
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, train_step
from slimnas.train.recipe import TrainRecipe

CLASSES = 3
RECIPE = TrainRecipe(epochs=3, batch_size=4, lr=1e-2)
CPU = accelerator_for("cpu")


class Small(nn.Module):
    """Two branches, so that a step may leave one untouched; BN, so that there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, CLASSES)
        self.second = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor, branch: int) -> Tensor:
        pooled = self.norm(self.conv(images)).relu().mean((2, 3))
        logits: Tensor = (self.first, self.second)[branch](pooled)
        return logits


def image_set(count: int = 17) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, (0.5,) * 3, (0.25,) * 3, True)


def task(
    recipe: TrainRecipe = RECIPE, *, branch: Callable[[int], int] = lambda step: step % 2
) -> TrainTask:
    torch.manual_seed(1)
    model = Small()

    def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return cross_entropy(model(images, branch(step)), labels)

    groups = decay_groups(dict(model.named_parameters()), recipe)
    return TrainTask(model, groups, loss, image_set(), recipe, seed=5)


def one_step(given: TrainTask, state: TrainState, step: int) -> float:
    epoch, batch = divmod(step, 4)
    images, labels = list(
        given.images.batches(4, device="cpu", seed=5, epoch=epoch, augment=given.recipe.augment)
    )[batch]
    return train_step(given, state, CPU, images, labels)[0]


def everything(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v.clone() for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v.clone() for k, v in state.ema.state_dict().items()}
    names = {p: n for n, p in state.model.named_parameters()}
    for parameter, values in state.optimizer.state.items():
        tensors |= {f"moments.{names[parameter]}.{k}": v.clone() for k, v in values.items()}
    return tensors


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


class StoppedError(Exception):
    """Stands for whatever ends a run."""


def stop_at(step: int) -> Watch:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise StoppedError("stopped on purpose")

    return Watch(on_step)


def ctrl_c_at(step: int, times: int = 1) -> Watch:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            for _ in range(times):
                press_ctrl_c()

    return Watch(on_step)
