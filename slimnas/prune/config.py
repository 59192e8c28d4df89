"""Everything that decides what a pruning run gives, as one document in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slimnas._files import atomic_write_text
from slimnas._settings import flat_settings, require_same_settings
from slimnas.arch.documents import Spec, check_schema, load_json, parse_spec
from slimnas.prune.finetune import FinetuneRecipe

SCHEMA = "slimnas/prune-config/1"
WHAT = "the settings of a pruning run"
FILE = "config.json"

Whole = Annotated[int, Field(strict=True, ge=1)]
Unit = Literal["qk", "v", "ffn", "head", "embedding", "layer"]
BudgetKind = Literal["macs", "params", "latency_ms", "units"]


class BudgetSpec(Spec):
    """One budget.

    Attributes:
        kind: what is limited.
        limit: MACs, parameters, milliseconds, or number of units that stay.
        asked: as it was given, such as `0.9G`.
    """

    kind: BudgetKind
    limit: Annotated[float, Field(gt=0.0)]
    asked: str

    @property
    def label(self) -> str:
        """The name of its folder, such as `macs_0.9G`."""
        asked = self.asked.strip().replace("%", "pct")
        kind = {"latency_ms": "latency", "units": "ratio"}.get(self.kind, self.kind)
        return f"{kind}_{''.join(c if c.isalnum() or c in '._-' else '_' for c in asked)}"


class MeasureSpec(Spec):
    """How the found networks are timed.

    Attributes:
        runtime: a runtime's name.
        threads: that one call runs on.
        clock: `wall`, or `cpu` for the CPU time of the one thread.
    """

    runtime: str
    threads: Whole = 1
    clock: Literal["wall", "cpu"] = "wall"


class PruneConfig(Spec):
    """Settings of a pruning run; equal settings give equal results on the CPU.

    Attributes:
        model: what `--model` names.
        architecture_digest: of the network that is pruned.
        weights: what `--weights` names.
        weights_digest: of its tensors.
        data: what `--data` names.
        data_digest: of the images that importance is estimated on, and their labels.
        test_data: what `--test-data` names; None for a part of `data`.
        test_digest: of the labels of the images that accuracy is measured on.
        images: at most this many images for importance.
        batch_size: images per minibatch of the importance pass.
        labels: whether labels are the data's or the model's own predictions.
        criterion: of importance.
        basis: whether heads are turned into their principal axes first.
        budgets: each gives one network.
        units: what may be removed.
        method: how units are chosen.
        round_to: widths stay multiples of this.
        iterations: steps to each budget, importance estimated anew after each.
        correction: training-free correction after each step.
        finetune: how the result is trained; None for not at all.
        finetune_between: whether it is trained after every step, not only the last.
        table_digest: of the latency table, if one is used.
        scores_digest: of a score file that was given.
        seed: of everything random.
        measure: how latency is measured, besides what any table says; None for not at all.
    """

    model: str
    architecture_digest: str
    weights: str
    weights_digest: str
    data: str
    data_digest: str
    test_data: str | None = None
    test_digest: str
    images: Whole = 1000
    batch_size: Whole = 20
    labels: Literal["auto", "data", "model"] = "auto"
    criterion: str = "fisher"
    basis: Literal["principal", "channels"] = "principal"
    budgets: Annotated[tuple[BudgetSpec, ...], Field(min_length=1)]
    units: Annotated[tuple[Unit, ...], Field(min_length=1)] = ("qk", "v", "ffn")
    method: Literal["greedy", "exact"] = "greedy"
    round_to: Whole = 1
    iterations: Whole = 1
    correction: Literal["none", "bias", "least_squares"] = "none"
    finetune: FinetuneRecipe | None = None
    finetune_between: bool = False
    table_digest: str | None = None
    scores_digest: str | None = None
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    measure: MeasureSpec | None = None

    def save(self, path: Path) -> None:
        """Write JSON atomically."""
        body = {"schema": SCHEMA, **self.model_dump(mode="json")}
        atomic_write_text(path, json.dumps(body, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> PruneConfig:
        """Read what `save` wrote.

        Raises:
            SpecError: one line per fault, with file and key.
        """
        data = check_schema(load_json(path, WHAT), SCHEMA, WHAT, source=str(path))
        return parse_spec(cls, data, source=str(path))


def claim(folder: Path, config: PruneConfig) -> None:
    """Write `config` into a new run folder, or check that an old one has the same.

    Budgets may be added to a run, whose scores serve them all, and so may measurements.

    Raises:
        RunFolderError: names the settings that differ.
        SpecError: the folder's settings are damaged.
    """
    path = folder / FILE
    if path.is_file():
        require_same_settings(folder, _settled(PruneConfig.load(path)), _settled(config))
    config.save(path)


def _settled(config: PruneConfig) -> dict[str, Any]:
    """What later commands in the same folder must agree with."""
    return flat_settings(config.model_dump(mode="json", exclude={"budgets", "measure"}))
