"""What each process of a distributed test runs; `python -m torch.distributed.run` starts it.

    distributed_worker.py FOLDER [STEP]

Trains every task of `TASKS` and writes the averaged weights to FOLDER/NAME.safetensors. With STEP,
the second process kills itself in that step of the first task, once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.data.batches import ImageSet, MemoryPixels, Split
from slimnas.nn.build import build
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import SupernetRecipe, supernet_task
from slimnas.train import loop
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit
from slimnas.train.recipe import TrainRecipe

STEPS = 20
CLASSES = 4
NETWORK = """
schema: slimnas/architecture/1
name: small
input: {channels: 3, resolution: 32}
stem: {type: conv_stem, width: 8, act: relu}
stages:
  - {width: 8, blocks: [{type: mb4d}]}
  - {width: 16, downsample: {type: conv3x3}, blocks: [{type: mb3d, heads: 2, qk_dim: 4, v_dim: 8}]}
head: {type: linear, classes: 4}
"""
SPACE = """
schema: slimnas/search-space/1
name: small
input: {channels: 3, resolution: 32}
stem: {type: conv_stem, act: relu}
stages:
  - {width: {min: 8, max: 16, step: 8}, slots: 2, choices: [mb4d, identity]}
  - width: {min: 16, max: 16, step: 8}
    downsample: {type: conv3x3}
    slots: 2
    choices: [mb4d, mb3d, identity]
blocks:
  mb4d: {ffn_ratio: 2}
  mb3d: {heads: 2, qk_dim: 4, v_dim: 8, ffn_ratio: 2}
limits: {attention_last: true, monotone_widths: true}
head: {type: linear, classes: 4}
supernet: {resolution: 32}
"""


def images() -> ImageSet:
    """Twenty batches of eight."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8 * STEPS, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(len(pixels)) % CLASSES
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, (0.5,) * 3, (0.25,) * 3, True)


def plain_task() -> TrainTask:
    """A network in double precision, where rounding is far below what is asked."""
    recipe = TrainRecipe(epochs=1, batch_size=8, sync_bn=True)
    return _task(recipe, torch.float64)


def single_task() -> TrainTask:
    """The same in single precision.

    Gradients that are zero but for rounding, such as those of biases before BatchNorm, become
    whole steps of AdamW unless its epsilon is above them.
    """
    recipe = TrainRecipe(epochs=1, batch_size=8, sync_bn=True, eps=1e-3, lr=1e-3)
    return _task(recipe, torch.float32)


def accumulating_task() -> TrainTask:
    """Two micro-batches in each process; BatchNorm cannot see across those."""
    recipe = TrainRecipe(epochs=1, batch_size=8, accumulation=2)
    return _task(recipe, torch.float64, fixed_norms=True)


def _task(recipe: TrainRecipe, dtype: torch.dtype, *, fixed_norms: bool = False) -> TrainTask:
    network = build(Architecture.from_yaml(NETWORK), seed=3).to(dtype)

    def loss(model: nn.Module, x: Tensor, labels: Tensor, step: int) -> Tensor:
        if fixed_norms:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return cross_entropy(model(x.to(dtype)), labels)

    groups = decay_groups(dict(network.named_parameters()), recipe)
    return TrainTask(network, groups, loss, images(), recipe, seed=5)


def supernet_like() -> TrainTask:
    """A supernet whose routes are drawn in every step."""
    supernet = Supernet(SearchSpace.from_yaml(SPACE), resolution=32, seed=3).double()
    recipe = SupernetRecipe(epochs=1, batch_size=8, sync_bn=True)
    task = supernet_task(supernet, images(), recipe, seed=5)

    def loss(model: nn.Module, x: Tensor, labels: Tensor, step: int) -> Tensor:
        return task.loss(model, x.double(), labels, step)

    return TrainTask(supernet, task.groups, loss, task.images, recipe, seed=5, partial=task.partial)


TASKS: Mapping[str, Callable[[], TrainTask]] = {
    "plain": plain_task,
    "single": single_task,
    "accumulating": accumulating_task,
    "supernet": supernet_like,
}


def train(name: str, checkpoint: Path | None = None, watch: Watch | None = None) -> nn.Module:
    """The averaged model of one task."""
    accelerator = accelerator_for("cpu")
    return fit(TASKS[name](), accelerator, checkpoint=checkpoint, identity=name, watch=watch)


def main(folder: Path, kill_at: int | None) -> None:
    """Train all tasks, or the first with a killed process."""
    accelerator = accelerator_for("cpu")

    def on_step(report: StepReport) -> None:
        marker = folder / "killed"
        if report.step == kill_at and accelerator.process_index == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        loop.CHECKPOINT_SECONDS = 0.0
    for name in TASKS if kill_at is None else ["plain"]:
        checkpoint = None if kill_at is None else folder / "state.safetensors"
        averaged = train(name, checkpoint, Watch(on_step))
        if accelerator.is_main_process:
            save_file(averaged.state_dict(), folder / f"{name}.safetensors")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
