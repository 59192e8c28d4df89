"""Does importance say what removing a unit does to the loss? DeiT-T, units really removed.

    python benchmarks/pruning_first_order.py --weights deit_tiny_patch16_224.safetensors \
        --data train1000.parquet

A random sample of units of each kind is removed, one at a time, and the loss measured on the same
images that importance was estimated on. Spearman's rank correlation between importance and

    mean      |change of the mean loss|: what `taylor` predicts, squared, with one minibatch
    images    mean squared change of an image's loss: what `fisher` predicts

Both bases: the network's own channels, and the principal basis of every head.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from supernet_throughput import RESULTS_HEAD

import slimnas
from slimnas._files import atomic_write_text
from slimnas.data.splits import DataOptions
from slimnas.data.whole import open_whole
from slimnas.measure.machine import this_machine
from slimnas.prune.basis import to_principal_basis
from slimnas.prune.check import first_order_check
from slimnas.prune.taylor import score_all

HERE = Path(__file__).resolve().parent
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CRITERIA = ("fisher", "taylor")
KINDS = ("qk", "v", "ffn", "head")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per basis, criterion and kind."""
    options = DataOptions(
        resolution=(224, 224), channels=3, seed=arguments.seed, max_images=arguments.images
    )
    images = open_whole(arguments.data, options, normalisation=IMAGENET).images
    batch = list(images.eval_batches(arguments.images, device="cpu"))
    network = slimnas.create_model("deit_tiny", pretrained=arguments.weights).eval()
    rows = []
    for basis in ("channels", "principal"):
        turned = to_principal_basis(network, batch) if basis == "principal" else network
        scores = score_all(turned, batch, CRITERIA)
        for criterion in CRITERIA:
            found = first_order_check(
                turned, batch, scores[criterion], arguments.units, arguments.seed, kinds=KINDS
            )
            for kind in found.kinds():
                rows.append(
                    {
                        "basis": basis,
                        "criterion": criterion,
                        "kind": kind.kind,
                        "units": kind.units,
                        "with_mean_loss": kind.with_loss,
                        "with_images": kind.with_samples,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, write the JSON and a line of RESULTS.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--weights", required=True, help="DeiT-T, timm's layout")
    parser.add_argument("--data", required=True, help="ImageNet images")
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--units", type=int, default=40, help="most units of a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    machine = f"{this_machine().cpu}, torch {torch.__version__}"
    body = {
        "benchmark": "pruning_first_order",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "images": arguments.images,
        "seed": arguments.seed,
        "rows": rows,
    }
    atomic_write_text(
        arguments.output / "pruning_first_order.json", json.dumps(body, indent=1) + "\n"
    )
    own = {"fisher": "with_images", "taylor": "with_mean_loss"}
    shown = ", ".join(
        f"{row['basis']} {row['criterion']} {row['kind']} {row[own[row['criterion']]]:.2f}"
        for row in rows
    )
    results = arguments.output.parent / "RESULTS.md"
    text = results.read_text() if results.is_file() else RESULTS_HEAD
    settings = f"DeiT-T, {arguments.images} images, at most {arguments.units} units of a kind"
    line = (
        f"| {body['date']} | pruning_first_order | {machine} | {settings} | rank correlation of "
        f"importance with what it predicts (fisher: squared change per image, taylor: change of "
        f"the mean loss): {shown} |\n"
    )
    atomic_write_text(results, text.rstrip("\n") + "\n" + line)


if __name__ == "__main__":
    main()
