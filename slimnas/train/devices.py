"""Where training runs: one device, or one process per device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.rendezvous import rendezvous

from slimnas.data.batches import Part
from slimnas.errors import RuntimeUnavailableError, TrainingError
from slimnas.train.recipe import TrainRecipe

Precision = Literal["auto", "fp32", "bf16"]


def accelerator_for(
    device: str,
    *,
    precision: Precision = "auto",
    log_dir: Path | None = None,
    trackers: Sequence[str] = (),
) -> Accelerator:
    """An accelerator on `device`; of several processes where a launcher has started them.

    Args:
        device: auto, cpu, cuda or mps.
        precision: of forward passes; auto is bf16 where the GPU has it, else fp32.
        log_dir: where trackers write.
        trackers: names that accelerate knows, such as tensorboard.

    Raises:
        RuntimeUnavailableError: this machine lacks the device, or bf16 on it.
        TrainingError: the processes of a distributed run cannot reach each other.
    """
    found = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not found.get(device, False):
        usable = ", ".join(name for name, there in found.items() if there)
        raise RuntimeUnavailableError(
            f"training device {device!r} is not available here; choose one of: {usable}"
        )
    on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    on_mps = device == "mps" or (device == "auto" and found["mps"] and not on_cuda)
    bf16 = on_cuda and torch.cuda.is_bf16_supported()
    if precision == "bf16" and on_cuda and not bf16:
        raise RuntimeUnavailableError("this GPU has no bf16; use --precision fp32")
    if precision != "auto":
        bf16 = precision == "bf16"
    try:
        _join_restarted("cuda:nccl,cpu:gloo" if on_cuda else "gloo")
        return Accelerator(
            cpu=not (on_cuda or on_mps),
            mixed_precision="bf16" if bf16 else "no",
            log_with=list(trackers) or None,
            project_dir=log_dir,
        )
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"the processes of this run cannot reach each other ({reason}); give the launcher "
            "another --master-port (torchrun) or --main_process_port (accelerate launch)"
        ) from error


def _join_restarted(backend: str) -> None:
    """Join the other processes where torchrun has started all of them again.

    Its store keeps what the processes before have written, so that one would look for another
    where its predecessor was; each start gets a part of the store to itself.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or dist.is_initialized():
        return
    store, rank, processes = next(rendezvous("env://"))
    own = dist.PrefixStore(f"slimnas/start_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=processes)


def part_of(accelerator: Accelerator) -> Part:
    """Which images of every batch this process gets."""
    return Part(accelerator.process_index, accelerator.num_processes)


def check_batch(recipe: TrainRecipe, images: int, accelerator: Accelerator) -> None:
    """Refuse batches that do not divide among processes and micro-batches.

    Raises:
        TrainingError: says what must divide what.
    """
    shares = accelerator.num_processes * recipe.accumulation
    if recipe.batch_size % shares:
        raise TrainingError(
            f"batch_size: must be a multiple of {shares} ({accelerator.num_processes} processes x "
            f"accumulation {recipe.accumulation}), got {recipe.batch_size}; change --batch-size"
        )
    if images < recipe.batch_size and shares > 1:
        raise TrainingError(
            f"batch_size: must be at most the {images} images of TRAIN, got {recipe.batch_size}; "
            "give a smaller --batch-size"
        )
