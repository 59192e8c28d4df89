"""Found networks that no baseline beats, as entries of a zoo with their trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _quality_report import OURS, TITLES, Place, place_of
from _quality_stages import Bench
from _quality_training import note
from torch import Tensor

from slimnas.latency.target import latency_label
from slimnas.nn.build import build
from slimnas.prune.finetune import evaluate
from slimnas.zoo.entry import load_entry, save_entry
from slimnas.zoo.metrics import TEST_TOP1, Metric
from slimnas.zoo.preprocessing import KEY, TRAINED_AT, preprocessing
from slimnas.zoo.weights import load_weights

FAMILY = "found"
STORED = torch.float16


def entry_name(space: str, data: str, target_ms: float) -> str:
    """What the network found for a target is called: `found_micro_cifar10_0.3ms`."""
    return f"{FAMILY}_{space.rpartition('_')[2]}_{data}_{latency_label(target_ms)}"


def undefeated(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of found networks that are worth keeping.

    Below no baseline's front by more than noise, and no other found network is as good and faster.
    """
    beaten = {one["target_ms"] for one in result["verdicts"] if one["words"] == "below"}
    images = result["data"]["test_images"]
    found = [row for row in result["rows"] if row["arm"] == OURS]
    places = {row["target_ms"]: place_of(row, images) for row in found}

    def dominated(place: Place) -> bool:
        others = (one for one in places.values() if one != place)
        return any(o.latency_ms <= place.latency_ms and o.top1 >= place.top1 for o in others)

    return [
        row
        for row in found
        if row["target_ms"] not in beaten and not dominated(places[row["target_ms"]])
    ]


def ship(bench: Bench, result: Mapping[str, Any], zoo: Path) -> list[str]:
    """Write an entry for each of the `undefeated`, with the weights of the first training.

    Weights are stored in half precision; the accuracy is that of the stored ones. An entry that is
    there already is left as it is, so that a run that was stopped goes on.

    Returns:
        The names of the entries written.
    """
    names = []
    for row in undefeated(result):
        target_ms, images = row["target_ms"], bench.final_data.train
        name = entry_name(bench.bare_space.name, result["data"]["title"], target_ms)
        if (zoo / name).exists():
            note(f"{zoo / name} is there already, left as it is; remove it to write it anew")
            continue
        trained = load_entry(bench.cache / row["trained"])
        assert trained.weights is not None
        whole = load_weights(trained.weights, trained.architecture)
        weights = {key: _stored(value) for key, value in whole.items()}
        network = build(trained.architecture)
        network.load_state_dict(weights)
        top1 = evaluate(network, bench.final_data.test, bench.finals.accelerator.device)
        provenance = {
            "source": f"found by slimnas search, {bench.space.name}, for {target_ms:g} ms; "
            f"{trained.architecture.provenance['source']}",
            "target_ms": target_ms,
            TRAINED_AT: bench.resolution,
            KEY: preprocessing(images.mean, images.std),
        }
        save_entry(
            zoo,
            name,
            architecture=trained.architecture.renamed(name, provenance),
            weights=weights,
            metrics=_metrics(result, row, top1),
        )
        names.append(name)
    return names


def _stored(value: Tensor) -> Tensor:
    return value.to(STORED) if value.is_floating_point() else value


def _metrics(result: Mapping[str, Any], row: Mapping[str, Any], top1: float) -> dict[str, Metric]:
    data, settings = result["data"], result["settings"]
    how = (
        f"trained from random weights for {settings['epochs']} epochs on {data['train_images']} "
        f"images of {data['title']} at {data['resolution']} px"
    )
    metrics = {
        TEST_TOP1: Metric(
            top1,
            f"measured on the {data['test_images']} TEST images of {data['title']} with these "
            f"weights (half precision), {how}, seed {settings['seed']}",
        ),
        **_latency(result, row),
        "params": Metric(row["params"], "computed by closed form"),
        "macs": Metric(row["macs"], "computed by closed form, one image"),
    }
    for one in result["verdicts"]:
        if one["target_ms"] == row["target_ms"] and one["margin"] is not None:
            metrics[f"points_above_{one['arm']}"] = Metric(
                one["margin"],
                f"TEST top-1 above the front of: {TITLES[one['arm']]}; ± {one['error']:.2f} "
                f"(standard error), so {one['words']}; all {how}, seeds: {settings['seeds']} "
                "(benchmarks/search_quality.py)",
            )
    return metrics


def _latency(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Metric]:
    runtime, threads = result["table"]["runtime"], result["settings"]["threads"]
    where = (
        f"{runtime['name']} {runtime['version']} on {result['machine']['cpu']}, {threads} thread"
    )
    if row["measured_ms"] is None:
        return {"latency_ms": Metric(row["predicted_ms"], f"by the latency table: {where}")}
    said = f"measured on {result['date']} with {where}, one image; ± {row['measured_error_ms']:.3f}"
    return {"latency_ms": Metric(row["measured_ms"], f"{said} ms (standard error)")}
