"""What a supernet's recipe does to its ranking of networks, and to the gradient of its choices.

    python benchmarks/supernet_ranking.py

On a small space and the built-in digits, in minutes on one core; resumable, every finished network
and supernet is kept in `results/supernet_ranking.json`.

1. Random networks of the space, each trained alone on one budget; supernets by several recipes;
   rank correlation (Kendall tau, Spearman) between the accuracy of a network with inherited
   weights and its loss (`--by top1`: its accuracy) when trained alone.
2. At the weights of a default supernet, over many random paths and batches: the gradient of the
   architecture parameters by `alpha_gradient` output and change, beside the slope of the expected
   loss, p_j (E[loss | choice j] - E[loss]) / tau, from the losses of the same paths.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import slimnas
from slimnas._files import atomic_write_text
from slimnas.analysis.budget import recalibrate_norms
from slimnas.arch.space import SearchSpace, Selection
from slimnas.data.splits import SearchData, open_data
from slimnas.nn.build import build
from slimnas.search.config import SearchConfig
from slimnas.search.importance import ImportanceRecord
from slimnas.search.run import open_evaluator
from slimnas.supernet.recipe import SupernetRecipe
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import TrainedSupernet, train_supernet
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import TrainTask, decay_groups, fit
from slimnas.train.recipe import TrainRecipe

HERE = Path(__file__).resolve().parent
SPACE = """
schema: slimnas/search-space/1
name: probe
input: {channels: 1, resolution: 32}
stages:
- {width: {min: 8, max: 24, step: 8}, slots: 2, choices: [mb4d, identity]}
- width: {min: 8, max: 32, step: 8}
  slots: 2
  choices: [mb4d, identity]
  downsample: {type: conv3x3}
- width: {min: 16, max: 48, step: 8}
  slots: 4
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 10}
blocks: {mb3d: {heads: 4, qk_dim: 8, v_dim: 8}}
supernet: {resolution: 32}
"""
NETWORKS, SEEDS, EPOCHS, TAU, PATHS = 12, (0, 1), 4, 1.5, 400
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"epochs": EPOCHS},
    "default, 3 times as long": {"epochs": 3 * EPOCHS},
    "alpha_warmup 0.3": {"epochs": EPOCHS, "alpha_warmup": 0.3},
    "sandwich 1": {"epochs": EPOCHS, "sandwich": 1},
    "sandwich 3": {"epochs": EPOCHS, "sandwich": 3},
    "sandwich 3, alpha_gradient change": {
        "epochs": EPOCHS,
        "sandwich": 3,
        "alpha_gradient": "change",
    },
}
CPU = accelerator_for("cpu")


def smoothed(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """The loss of networks trained alone."""
    return cross_entropy(model(images), labels, label_smoothing=0.1)


def alone(space: SearchSpace, selection: Selection, data: SearchData, seed: int) -> dict[str, Any]:
    """Top-1 in percent and mean loss on SEARCH of one network trained by itself."""
    recipe = TrainRecipe(epochs=EPOCHS, ema_decay=0.9)
    network = build(space.architecture(selection), seed=seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(SupernetRecipe().layer_scale)
    groups = decay_groups(dict(network.named_parameters()), recipe)
    averaged = fit(TrainTask(network, groups, smoothed, data.train, recipe, seed), CPU)
    images, _ = next(data.train.batches(512, device="cpu", seed=0, epoch=0, augment=False))
    recalibrate_norms(averaged, [images])  # type: ignore[arg-type]
    with torch.no_grad():
        images, labels = next(data.search.eval_batches(len(data.search), device="cpu"))
        logits = averaged(images)
    right = (logits.argmax(1) == labels).float().mean()
    return {"top1": 100.0 * float(right), "loss": float(cross_entropy(logits, labels))}


def trained(
    space: SearchSpace, data: SearchData, recipe: SupernetRecipe, seed: int
) -> TrainedSupernet:
    """A supernet of the space."""
    supernet = Supernet(space, resolution=32, seed=seed, layer_scale=recipe.layer_scale)
    return train_supernet(supernet, data, recipe, CPU, seed=seed)


def inherited(one: TrainedSupernet, data: SearchData, selections: list[Selection]) -> list[float]:
    """Top-1 in percent on SEARCH of networks with the supernet's weights."""
    config = SearchConfig(
        **{"space": "probe", "space_digest": "", "device": "", "table_digest": ""},
        targets_ms=(1.0,),
        resolution=32,
    )
    importance = ImportanceRecord(one.supernet.alphas(), {})
    judge = open_evaluator(config, one.supernet, importance, data, order=one.channel_order())
    return [judge.top1(selection) for selection in selections]


def gradients(one: TrainedSupernet, data: SearchData) -> dict[str, Any]:
    """How well each kind of gradient follows the slope of the expected loss."""
    supernet = one.supernet.requires_grad_(True).train()
    paths = list(supernet.meta_paths())
    alphas = [path.alpha for path in paths]
    batches = list(data.train.batches(64, device="cpu", seed=9, epoch=0, augment=True))
    drawn: dict[str, list[np.ndarray[Any, Any]]] = {"output": [], "change": []}
    losses: list[list[list[float]]] = [[[] for _ in path.choices] for path in paths]
    for number in range(PATHS):
        images, labels = batches[number % len(batches)]
        for kind in ("output", "change"):
            generator = torch.Generator().manual_seed(number)
            routes = supernet.draw_routes(
                *(TAU,), mixing="sampled", noise="gumbel", generator=generator, gradient=kind
            )
            loss = cross_entropy(supernet(images, routes), labels, label_smoothing=0.1)
            found = torch.autograd.grad(loss, alphas, materialize_grads=True)
            drawn[kind].append(torch.cat(found).numpy())
        for seen, route in zip(losses, routes, strict=True):
            assert route.index is not None
            seen[route.index].append(loss.item())
    slope = np.concatenate(
        [_slope(a.detach(), seen) for a, seen in zip(alphas, losses, strict=True)]
    )
    return {kind: _agreement(np.stack(rows), slope) for kind, rows in drawn.items()}


def _slope(alpha: Tensor, losses: list[list[float]]) -> np.ndarray[Any, Any]:
    p = torch.softmax(alpha / TAU, 0).numpy()
    means = np.array([np.mean(of_choice) for of_choice in losses])
    result: np.ndarray[Any, Any] = p * (means - (p * means).sum()) / TAU
    return result


def _agreement(rows: np.ndarray[Any, Any], slope: np.ndarray[Any, Any]) -> dict[str, float]:
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    return {
        "correlation_with_slope": float(np.corrcoef(mean, slope)[0, 1]),
        "same_sign_share": float((np.sign(mean) == np.sign(slope)).mean()),
        "signal_to_noise_of_a_step": float((np.abs(mean) / deviation).mean()),
    }


def ranks(accuracies: list[float], truths: list[float]) -> dict[str, float]:
    """Rank correlations and the mean of the accuracies."""
    return {
        "kendall_tau": float(kendalltau(accuracies, truths)[0]),
        "spearman": float(spearmanr(accuracies, truths)[0]),
        "mean_inherited_top1": float(np.mean(accuracies)),
    }


class Kept:
    """Results by key, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, make: Callable[..., Any], *given: Any) -> Any:
        """The kept result, or that of `make(*given)`."""
        if key not in self.values:
            self.values[key] = make(*given)
            text = json.dumps(self.values, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path, text)
            print(f"done: {key}", flush=True)
        return self.values[key]


def lines(kept: Kept, by: str) -> Iterator[str]:
    """Train what is missing; lines of a Markdown table."""
    space = SearchSpace.from_yaml(SPACE)
    data = open_data("digits", resolution=(32, 32), channels=1, seed=0).for_search()
    rng = random.Random(5)
    networks = [space.random(rng) for _ in range(NETWORKS)]
    kept.get("made", lambda: {"date": _today(), "slimnas": slimnas.__version__})
    truths = [
        np.mean(
            [
                (1 if by == "top1" else -1)
                * kept.get(f"alone {i} seed {seed}", alone, space, one, data, seed)[by]
                for seed in SEEDS
            ]
        )
        for i, one in enumerate(networks)
    ]
    yield f"| recipe | seed | Kendall tau | Spearman (by {by}) | mean inherited top-1 |"
    yield "|---|---|---|---|---|"
    for name, changes in RECIPES.items():
        recipe = SupernetRecipe.model_validate(changes)
        for seed in SEEDS:
            key = f"{name} seed {seed}"
            accuracies = kept.get(key, _ranked, space, data, recipe, seed, networks)
            got = ranks(accuracies, truths)
            yield "| " + " | ".join([name, str(seed), *(f"{v:.2f}" for v in got.values())]) + " |"
    recipe = SupernetRecipe.model_validate(RECIPES["default"])
    found = kept.get("gradients", _followed, space, data, recipe)
    for kind, values in found.items():
        yield f"alpha_gradient {kind}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items())


def _ranked(
    space: SearchSpace,
    data: SearchData,
    recipe: SupernetRecipe,
    seed: int,
    networks: list[Selection],
) -> list[float]:
    return inherited(trained(space, data, recipe, seed), data, networks)


def _followed(space: SearchSpace, data: SearchData, recipe: SupernetRecipe) -> dict[str, Any]:
    return gradients(trained(space, data, recipe, 0), data)


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    parser.add_argument("--by", default="loss", choices=("loss", "top1"), help="of networks alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(given.output / "results" / "supernet_ranking.json")
    print("\n".join(lines(kept, given.by)))


if __name__ == "__main__":
    main()
