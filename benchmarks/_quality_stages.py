"""The stages of the comparison, each kept in the cache under what it depends on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from _quality_arms import evolved, judge, random_at, uniform_scaling
from _quality_report import OURS
from _quality_settings import QUICK_SPACE, QUICK_TABLE, Settings
from _quality_training import Counter, Job, Trained, Trainer, note
from scipy.stats import kendalltau, spearmanr

from slimnas._files import atomic_write_text
from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.data.splits import DataSplits, open_data
from slimnas.errors import LatencyTableError, RuntimeUnavailableError, UnreachableTargetError
from slimnas.latency.estimate import latency_ms
from slimnas.latency.table import DEVICE_FILE, LatencyTable
from slimnas.measure.local import LocalDevice, open_local
from slimnas.measure.visits import time_networks
from slimnas.search.checks import table_digest
from slimnas.search.importance import ImportanceRecord
from slimnas.search.trajectory import Trajectory
from slimnas.supernet.train import load_supernet
from slimnas.train.devices import accelerator_for

WITHOUT_END = "1000s"
"""A target that every network meets: the search ends once the supernet is trained."""

SELECTION_SEED = 1000
"""Added to the seed of the trainings that choose among random networks: the figures are of other
trainings, so that the luck of the chosen one is not counted."""

LEAST_USED = 0.85
"""Share of a target that NSGA-II's network uses at least, where it has found one: slimming aims at
the target, and a small network would lose to it by its size alone."""


@dataclass(frozen=True)
class Candidate:
    """A network that stands for a way of finding networks, at a target.

    Attributes:
        arm: the way; several of `random`, of which training chooses one.
        target_ms: the target.
        predicted_ms: by the table, as corrected by what the search measured.
        inherited_top1: on SEARCH with the supernet's weights, in percent, where it is known.
        architecture: with the data's classes.
    """

    arm: str
    target_ms: float
    predicted_ms: float
    inherited_top1: float | None
    architecture: Architecture

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.arm} at {self.target_ms:g} ms"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "architecture": self.architecture.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Candidate:
        """Inverse of `to_dict`."""
        return cls(**{**data, "architecture": Architecture.from_dict(data["architecture"])})


def slimnas_json(*words: object) -> dict[str, Any]:
    """What a `slimnas` command says with --json; its progress goes to stderr.

    Raises:
        SystemExit: the command failed; it has said why.
    """
    command = [sys.executable, "-m", "slimnas", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    body: dict[str, Any] = json.loads(done.stdout)
    return body


def key_of(*parts: object) -> str:
    """A short name of everything in `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON in a file; read where it is there."""
    if not path.is_file():
        atomic_write_text(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


class Bench:
    """The stages; each is skipped where the cache holds its result.

    Args:
        settings: what is compared and how.
        cache: of everything.
        table: folder of a latency table to take instead of building one.
    """

    def __init__(self, settings: Settings, cache: Path, table: Path | None) -> None:
        self.settings, self.cache, self._table = settings, cache, table

    @cached_property
    def bare_space(self) -> SearchSpace:
        """As its file has it, but for the deployment resolution where one is asked for."""
        quick = self.settings.quick
        name = self.settings.space
        space = SearchSpace.from_yaml(QUICK_SPACE) if quick else SearchSpace.load(name)
        if self.settings.deploy is None:
            return space
        data = {**space.model_dump(), "name": f"{space.name}_{self.settings.deploy}px"}
        data["input"]["resolution"] = self.settings.deploy
        return SearchSpace.model_validate(data)

    @cached_property
    def space(self) -> SearchSpace:
        """With the data's classes."""
        return self.bare_space.with_classes(self.data.classes)

    @cached_property
    def resolution(self) -> int:
        """Side of training images."""
        return self.settings.resolution or self.bare_space.supernet.resolution

    @cached_property
    def data(self) -> DataSplits:
        """TRAIN, SEARCH and TEST of the search, and of what chooses among random networks."""
        return self._open_data(self.settings.max_images)

    @cached_property
    def final_data(self) -> DataSplits:
        """Those of the trainings that give the figures."""
        if self.settings.final_images is None:
            return self.data
        return self._open_data(self.settings.final_images)

    def _open_data(self, max_images: int | None) -> DataSplits:
        settings = self.settings
        found = open_data(
            settings.data,
            resolution=(self.resolution, self.resolution),
            channels=self.bare_space.input.channels,
            seed=settings.seed,
            max_images=max_images,
        )
        note(f"data: {found.description}")
        return found

    @cached_property
    def table_folder(self) -> Path:
        """The folder of the latency table."""
        if self._table is not None:
            return self._table
        settings = self.settings
        key = key_of(self.bare_space.to_yaml(), settings.backend, settings.threads, settings.clock)
        folder = self.cache / f"table-{key}" / "local"
        if not (folder / DEVICE_FILE).is_file():
            slimnas_json(
                *("latency", "build", "--output", folder, "--space", self._space_file),
                *("--backend", settings.backend, "--threads", settings.threads),
                *("--clock", settings.clock, *(QUICK_TABLE if settings.quick else ())),
            )
        return folder

    @cached_property
    def table(self) -> LatencyTable:
        """The latency table that the search starts with."""
        return LatencyTable.load(self.table_folder)

    @cached_property
    def supernet(self) -> Path:
        """The trained supernet."""
        folder = self.cache / f"supernet-{self._supernet_key}"
        path = folder / "supernet.safetensors"
        if not (folder / "search.json").is_file():
            words = ("--epochs", str(self.settings.supernet_epochs), "--no-measure")
            body = self._search([WITHOUT_END], folder, *words)
            atomic_write_text(folder / "search.json", json.dumps(body) + "\n")
        return path

    @property
    def _supernet_key(self) -> str:
        settings = self.settings
        return key_of(
            self.space.to_yaml(), self.data.digest, settings.supernet_epochs, settings.seed
        )

    @cached_property
    def targets_ms(self) -> tuple[float, ...]:
        """Descending."""
        if self.settings.targets:
            return tuple(sorted(self.settings.targets, reverse=True))
        trained = load_supernet(self.supernet)
        start = ImportanceRecord(trained.supernet.alphas(), {}).start(self.space)
        largest_ms = latency_ms(self.space.architecture(start), self.table)
        note(f"largest network: {largest_ms:.3f} ms by the table")
        return tuple(round(share * largest_ms, 3) for share in sorted(self.settings.shares)[::-1])

    @cached_property
    def run(self) -> Path:
        """The run folder of the search."""
        settings = self.settings
        table = table_digest(self.table)
        key = key_of(self._supernet_key, table, self.targets_ms, settings.search_images)
        folder = self.cache / f"search-{key}{'' if settings.measure else '-unmeasured'}"
        if not (folder / "search.json").is_file():
            words = ["--supernet", str(self.supernet)]
            words += [] if settings.measure else ["--no-measure"]
            body = self._search([f"{ms!r}ms" for ms in self.targets_ms], folder, *words)
            for one in body["found"]:  # paths may change, contents do not
                one["architecture"] = Architecture.load(one["architecture"]).to_dict()
            atomic_write_text(folder / "search.json", json.dumps(body, indent=1) + "\n")
        return folder

    def _search(self, targets: Sequence[str], folder: Path, *more: object) -> dict[str, Any]:
        settings, limit = self.settings, self.settings.max_images
        return slimnas_json(
            *("search", "--output", folder),
            *(word for target in targets for word in ("--target-latency", target)),
            *("--device", self.table_folder, "--space", self._space_file),
            *("--data", settings.data, "--resolution", self.resolution, "--seed", settings.seed),
            *("--search-images", settings.search_images, "--train-on", settings.train_on),
            *(() if limit is None else ("--max-images", limit)),
            *more,
        )

    @cached_property
    def _space_file(self) -> Path:
        """The space as the commands take it."""
        text = self.bare_space.to_yaml()
        path = self.cache / f"space-{key_of(text)}.yaml"
        atomic_write_text(path, text)
        return path

    @cached_property
    def corrected(self) -> LatencyTable:
        """The table as corrected by what the search measured."""
        corrected = self.run / "corrected_table"
        return LatencyTable.load(corrected) if corrected.is_dir() else self.table

    @cached_property
    def evaluations(self) -> int:
        """How often the search evaluated a selection: the start, and every candidate."""
        steps = Trajectory.load(self.run / "trajectory.jsonl").steps
        return 1 + sum(len(step.candidates) for step in steps)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Every network to train."""
        settings = self.settings
        path = self.run / f"networks-{key_of(settings.random, settings.seed, LEAST_USED)}.json"
        return [
            Candidate.from_dict(one)
            for one in kept(path, lambda: [c.to_dict() for c in self._make_candidates()])
        ]

    def _make_candidates(self) -> list[Candidate]:
        space, table, settings = self.space, self.corrected, self.settings
        body = json.loads((self.run / "search.json").read_text(encoding="utf-8"))
        evolution = evolved(
            self.run,
            self.supernet,
            space,
            table,
            self.data.for_search(),
            evaluations=self.evaluations,
            device=accelerator_for(settings.train_on).device,
            note=Counter("NSGA-II", self.evaluations),
        )

        def price(architecture: Architecture) -> float:
            return latency_ms(architecture, table)

        def evolved_at(target_ms: float) -> tuple[Architecture, float]:
            best = evolution.best(target_ms, LEAST_USED * target_ms)
            return space.architecture(best.selection, name="nsga2"), best.top1

        found = []
        for target_ms in self.targets_ms:
            answer = next(one for one in body["found"] if one["target_ms"] == target_ms)
            ours = Architecture.from_dict(answer["architecture"])
            made: list[tuple[str, Architecture, float | None]] = [
                (OURS, ours, answer["search_top1"])
            ]
            # A baseline without a network this fast says so in the results, and stops nothing.
            with _noting_unreached("uniform", target_ms):
                made.append(("uniform", uniform_scaling(space, price, target_ms), None))
            with _noting_unreached("nsga2", target_ms):
                made.append(("nsga2", *evolved_at(target_ms)))
            drawn = random_at(space, price, target_ms, settings.random, settings.seed)
            made += [("random", one, None) for one in drawn]
            found += [
                Candidate(arm, target_ms, price(one), top1, one.renamed(f"{arm}_{target_ms:g}ms"))
                for arm, one, top1 in made
            ]
        return found

    @cached_property
    def trials(self) -> Trainer:
        """Trains networks on the images of the search."""
        return self._trainer(self.data)

    @cached_property
    def finals(self) -> Trainer:
        """Trains networks for the figures; as `trials` unless other images are asked for."""
        return self._trainer(self.final_data)

    def _trainer(self, data: DataSplits) -> Trainer:
        return Trainer(
            data=data,
            recipe=self.settings.recipe,
            resolution=self.resolution,
            layer_scale=self.settings.layer_scale,
            accelerator=accelerator_for(self.settings.train_on),
            folder=self.cache / "trained",
        )

    def jobs(self, candidate: Candidate) -> list[Job]:
        """The trainings behind a network's figures."""
        first = self.settings.seed
        return [
            Job(f"{candidate.title}, seed {seed}", candidate.architecture, seed)
            for seed in range(first, first + self.settings.seeds)
        ]

    @cached_property
    def chosen(self) -> list[tuple[Candidate, list[Trained]]]:
        """One network per target and arm, trained with every seed."""
        trial_seed = self.settings.seed + SELECTION_SEED
        drawn = [one for one in self.candidates if one.arm == "random"]
        rest = [one for one in self.candidates if one.arm != "random"]
        trials = [
            Job(f"{one.title}, to choose", one.architecture, trial_seed, keep=False)
            for one in drawn
        ]
        results = self.trials.run([*trials, *(self.jobs(one)[0] for one in rest)])
        ranked = sorted(zip(drawn, results, strict=False), key=lambda pair: -pair[1].search_top1)
        best = {one.target_ms: one for one, _ in reversed(ranked)}
        finals = [*rest, *best.values()]
        arms = list(dict.fromkeys(one.arm for one in self.candidates))
        finals.sort(key=lambda one: (-one.target_ms, arms.index(one.arm)))
        self.finals.run([job for one in reversed(finals) for job in self.jobs(one)])
        return [(one, self.finals.run(self.jobs(one))) for one in finals]

    def random_trials(self) -> list[dict[str, Any]]:
        """What the choice among random networks was made from."""
        return [
            {
                "target_ms": one.target_ms,
                "predicted_ms": one.predicted_ms,
                "widths": one.architecture.widths,
                "depths": one.architecture.depths,
                **asdict(self._first_training(one)),
            }
            for one in self.candidates
            if one.arm == "random"
        ]

    def ranking(self) -> dict[str, Any]:
        """How the supernet orders networks of the space, beside how they come out of training.

        All networks but the scaled ones, which have widths that the space has not.
        """
        networks = {one.architecture.digest: one for one in self.candidates if one.arm != "uniform"}
        path = self.run / f"inherited-{key_of(list(networks))}.json"
        inherited = kept(path, lambda: self._inherited(networks))
        trained = {digest: self._first_training(one) for digest, one in networks.items()}
        pairs = [(inherited[digest], trained[digest].test_top1) for digest in networks]
        return {
            "networks": len(pairs),
            "kendall_tau": float(kendalltau(*zip(*pairs, strict=True)).statistic),
            "spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic),
            "inherited_search_top1": [first for first, _ in pairs],
            "trained_test_top1": [second for _, second in pairs],
        }

    def _inherited(self, networks: Mapping[str, Candidate]) -> dict[str, float]:
        device = accelerator_for(self.settings.train_on).device
        data = self.data.for_search()
        evaluate, _ = judge(self.run, self.supernet, self.space, data, device)
        return {
            digest: evaluate(self.space.select(one.architecture))
            for digest, one in networks.items()
        }

    def _first_training(self, candidate: Candidate) -> Trained:
        drawn = candidate.arm == "random"
        seed = self.settings.seed + SELECTION_SEED if drawn else self.settings.seed
        (trained,) = self.trials.run([Job(candidate.title, candidate.architecture, seed)])
        return trained

    def measured(self) -> dict[str, dict[str, float]]:
        """Digest -> latency and its standard error, all measured side by side; empty without."""
        if not self.settings.measure:
            return {}
        try:
            device = open_local(self.table, self.bare_space)
        except (LatencyTableError, RuntimeUnavailableError) as error:
            note(f"latencies are the table's, nothing is measured: {error}")
            return {}
        networks = list({one.architecture: None for one, _ in self.chosen})
        path = self.cache / f"measured-{key_of(device.setup, [n.digest for n in networks])}.json"
        found: dict[str, dict[str, float]] = kept(path, lambda: _measure(networks, device))
        return found


@contextmanager
def _noting_unreached(arm: str, target_ms: float) -> Iterator[None]:
    try:
        yield
    except UnreachableTargetError as error:
        note(f"no network of {arm} at {target_ms:g} ms: {error}")


def _measure(networks: Sequence[Architecture], device: LocalDevice) -> dict[str, dict[str, float]]:
    timings, _ = time_networks(
        networks,
        device.runtime,
        device.protocol,
        reference=device.reference,
        batch=device.batch,
        progress=Counter("measuring"),
    )
    return {
        one.architecture.digest: {"latency_ms": one.latency_ms, "error_ms": one.error_ms}
        for one in timings
    }
