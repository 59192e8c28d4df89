"""What each process of a distributed test of a sandwich runs: sandwich_worker.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from distributed_worker import SPACE, images
from safetensors.torch import save_file
from torch import Tensor, nn

from slimnas.arch.space import SearchSpace
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import SupernetRecipe, supernet_task
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import TrainTask, fit


def train() -> nn.Module:
    """The averaged supernet: double precision, BatchNorm over all processes."""
    supernet = Supernet(SearchSpace.from_yaml(SPACE), resolution=32, seed=3).double()
    recipe = SupernetRecipe(
        epochs=1,
        batch_size=8,
        sync_bn=True,
        alpha_warmup=0.25,
        sandwich=4,
        sandwich_distillation=True,
    )
    task = supernet_task(supernet, images(), recipe, seed=5)

    def loss(model: nn.Module, x: Tensor, labels: Tensor, step: int) -> Tensor:
        return task.loss(model, x.double(), labels, step)

    doubled = TrainTask(
        supernet, task.groups, loss, task.images, recipe, seed=5, partial=task.partial
    )
    return fit(doubled, accelerator_for("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    weights = train().state_dict()
    accelerator = accelerator_for("cpu")
    save_file(weights, Path(sys.argv[1]) / f"{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
