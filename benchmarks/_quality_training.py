"""Every network of the comparison trained alike from random weights, each result kept.

Trained on TRAIN alone: SEARCH chooses among random networks, TEST gives the figures. A result's
name says all that it depends on, so several processes may share a cache: each takes networks that
no other is training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimnas._files import atomic_write_text
from slimnas._lock import folder_lock
from slimnas.analysis.budget import recalibrate_norms
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.data.splits import DataSplits
from slimnas.errors import RunFolderError
from slimnas.nn.build import Network, build
from slimnas.prune.finetune import evaluate, train_on_labels
from slimnas.train.loop import StepReport
from slimnas.train.recipe import TrainRecipe
from slimnas.zoo.entry import save_model
from slimnas.zoo.metrics import TEST_TOP1, Metric

NOTE_S, POLL_S = 20.0, 2.0
CALIBRATION_BATCH, CALIBRATION_BATCHES = 100, 10
STATE, RESULT = "training.safetensors", "result.json"


def note(words: str) -> None:
    """A line of progress."""
    print(words, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in words: `50 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Counter:
    """Says on stderr how far a stage is, and how long it still takes."""

    def __init__(self, what: str, planned: int = 0) -> None:
        self._what, self._planned = what, planned
        self._began, self._noted, self._first = time.monotonic(), 0.0, -1

    def __call__(self, done: int, planned: object, name: object = "") -> None:
        """`planned` is a number of things, or where that is known what was done last."""
        total = planned if isinstance(planned, int) else self._planned
        self._first = done if self._first < 0 else self._first
        now = time.monotonic()
        if now - self._noted < 10 or done == self._first:
            return
        self._noted = now
        left = (now - self._began) / (done - self._first) * (total - done)
        note(f"{self._what} {done}/{total}, {duration(left)} left")


@contextlib.contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, once whoever holds it now has finished."""
    with contextlib.ExitStack() as held:
        waits = False
        while True:
            try:
                held.enter_context(folder_lock(folder))
                break
            except RunFolderError as error:
                if not _is_taken(error):
                    raise
                if not waits:
                    note(f"waiting: {error}")
                waits = True
                time.sleep(POLL_S)
        yield


def _is_taken(error: RunFolderError) -> bool:
    return "in use" in str(error)


@dataclass(frozen=True)
class Job:
    """A network to train.

    Attributes:
        title: for people.
        architecture: at its deployment resolution, with the data's classes.
        seed: of weights and batches.
        keep: whether its weights are wanted afterwards.
    """

    title: str
    architecture: Architecture
    seed: int
    keep: bool = True


@dataclass(frozen=True)
class Trained:
    """What came of a job.

    Attributes:
        seed: of weights and batches.
        search_top1: on SEARCH, in percent.
        test_top1: on TEST, in percent.
        images_per_s: of training, in the last epoch; None where that was over before the training
            was stopped and went on.
        threads: it trained on, where on a CPU.
    """

    seed: int
    search_top1: float
    test_top1: float
    images_per_s: float | None
    threads: int


@dataclass(frozen=True)
class Trainer:
    """How every network is trained.

    Attributes:
        data: TRAIN, SEARCH and TEST at `resolution`.
        recipe: see `TrainRecipe`.
        resolution: side of the images, pixels.
        layer_scale: initial value of every layer scale: the published 1e-5 needs hundreds of
            epochs until blocks matter, so that briefly trained deep networks would lose.
        accelerator: where.
        folder: of results and states.
    """

    data: DataSplits
    recipe: TrainRecipe
    resolution: int
    layer_scale: float
    accelerator: Accelerator
    folder: Path

    def run(self, jobs: Sequence[Job]) -> list[Trained]:
        """Train what has no result yet, and give the results of all, in order."""
        left = {self.key(job): job for job in jobs if self.result(job) is None}
        pace = Pace(self)
        while left:
            taken = len(left)
            for key, job in list(left.items()):
                if self.result(job) is None:
                    try:
                        with folder_lock(self.folder / key):
                            self._train(job, key, pace, list(left.values()))
                    except RunFolderError as error:
                        if not _is_taken(error):
                            raise
                        continue
                del left[key]
            if len(left) == taken:  # others are at them
                time.sleep(POLL_S)
        return [self._known(job) for job in jobs]

    def key(self, job: Job) -> str:
        """Names everything that a result depends on."""
        parts = [
            self._adapted(job).digest,
            job.seed,
            self.recipe.model_dump(mode="json"),
            self.data.digest,
            self.resolution,
            self.layer_scale,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def result(self, job: Job) -> Trained | None:
        """What came of a job; None where it is not finished."""
        path = self.folder / self.key(job) / RESULT
        if not path.is_file():
            return None
        return Trained(**json.loads(path.read_text(encoding="utf-8")))

    def work(self, job: Job) -> float:
        """Its multiply-adds in forward passes, which its time grows with."""
        steps = self.recipe.epochs * self.data.train.steps(self.recipe.batch_size)
        return float(cost(self._adapted(job)).macs * steps * self.recipe.batch_size)

    def _known(self, job: Job) -> Trained:
        result = self.result(job)
        assert result is not None
        return result

    def _adapted(self, job: Job) -> Architecture:
        return job.architecture.with_resolution(self.resolution)

    def _train(self, job: Job, key: str, pace: Pace, left: list[Job]) -> None:
        if self.result(job) is not None:  # another process was faster
            return
        folder = self.folder / key
        pace.begin(job, left)
        network = build(self._adapted(job), seed=job.seed)
        set_layer_scale(network, self.layer_scale)
        trained = train_on_labels(
            network,
            self.data.train,
            self.recipe,
            self.accelerator,
            seed=job.seed,
            checkpoint=folder / STATE,
            identity=key,
            on_step=pace.on_step,
        )
        recalibrate_norms(trained, self._calibration())
        device = self.accelerator.device
        result = Trained(
            seed=job.seed,
            search_top1=evaluate(trained, self.data.search, device),
            test_top1=evaluate(trained, self.data.test, device),
            images_per_s=pace.images_per_s,
            threads=torch.get_num_threads(),
        )
        if job.keep:
            self._save(job, trained, result, folder)
        atomic_write_text(folder / RESULT, json.dumps(asdict(result)) + "\n")
        (folder / STATE).unlink(missing_ok=True)
        note(f"{job.title}: TEST top-1 {result.test_top1:.2f} %, SEARCH {result.search_top1:.2f} %")

    def _save(self, job: Job, network: Network, result: Trained, folder: Path) -> None:
        how = (
            f"trained from random weights for {self.recipe.epochs} epochs on "
            f"{len(self.data.train)} images at {self.resolution} px, seed {job.seed}"
        )
        metrics = {
            TEST_TOP1: Metric(
                result.test_top1,
                f"{self.data.description}: {len(self.data.test)} TEST images; {how}",
            ),
            "search_top1_percent": Metric(
                result.search_top1, f"{len(self.data.search)} SEARCH images; {how}"
            ),
        }
        architecture = network.architecture.renamed(job.architecture.name, {"source": how})
        weights = {name: value.cpu() for name, value in network.state_dict().items()}
        save_model(folder, architecture=architecture, weights=weights, metrics=metrics)

    def _calibration(self) -> Iterator[Tensor]:
        size = min(CALIBRATION_BATCH, len(self.data.train))
        batches = self.data.train.batches(
            size, device=self.accelerator.device, seed=0, epoch=0, augment=False
        )
        return (images for images, _ in islice(batches, CALIBRATION_BATCHES))


@torch.no_grad()
def set_layer_scale(network: nn.Module, value: float) -> None:
    """Start every layer scale at `value`, as supernets do."""
    for name, parameter in network.named_parameters():
        if name.endswith(".gamma"):
            parameter.fill_(value)


class Pace:
    """Says now and then where training is and how long it still takes."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._done_work = self._seconds = 0.0
        self._title, self._job_work, self._left_work = "", 0.0, 0.0
        self._began = self._noted = time.monotonic()
        self._first_step = 0
        self.images_per_s: float | None = None

    def begin(self, job: Job, left: Sequence[Job]) -> None:
        """A network's training begins; `left` are all that are not finished, it included."""
        self._title, self._job_work = job.title, self._trainer.work(job)
        self._left_work = sum(self._trainer.work(one) for one in left)
        self._began, self._first_step, self.images_per_s = time.monotonic(), -1, None
        note(f"{job.title}: training; {len(left)} networks left")

    def on_step(self, report: StepReport) -> None:
        """After every step."""
        now = time.monotonic()
        if self._first_step < 0:
            self._first_step, self._began = report.step, now
            return
        self.images_per_s = report.images_per_s
        share = (report.step - self._first_step) / report.steps
        seconds, work = now - self._began, share * self._job_work
        if report.step == report.steps:
            self._done_work, self._seconds = self._done_work + work, self._seconds + seconds
            return
        if now - self._noted < NOTE_S:
            return
        self._noted = now
        here = seconds / share * (1 - report.step / report.steps)
        rate = (self._seconds + seconds) / (self._done_work + work)
        rest = rate * (self._left_work - report.step / report.steps * self._job_work)
        note(
            f"{self._title}: step {report.step}/{report.steps}, loss {report.loss:.3f}, "
            f"{report.images_per_s:.0f} images/s, {duration(here)} left of this network, about "
            f"{duration(rest)} of all"
        )
