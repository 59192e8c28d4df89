"""Write the points of the phone tables from the public measurements they come from.

    python tools/phone_points.py --ai-hub FILE --tflite-cnn FILE --tflite-transformer FILE

`--ai-hub`: model, precision, device, runtime, ms and unit of Qualcomm AI Hub's published
`perf.yaml` files (BSD-3-Clause) as one CSV. `--tflite-*`: the end-to-end tables of
qed-usc/mobile-ml-benchmark (MIT) as they are. Writes `points.csv` without features into the
folders of `lookup_tables/`; then run `tools/trace_features.py` and `tools/fit_device_model.py`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from slimnas.latency.fit import FAMILY
from slimnas.latency.points import POINTS_FILE, Point, points_to_csv

TABLES = Path(__file__).resolve().parent.parent / "lookup_tables"
FAMILY_WEIGHT = 4.0
"""Each EfficientFormer counts as often as four other networks: they are what the tables price."""

HUB_SOURCE = "Qualcomm AI Hub, qai_hub_models/models/{}/perf.yaml (BSD-3-Clause)"
HUB_TABLES = {"galaxy-s24": "Samsung Galaxy S24", "galaxy-s25": "Samsung Galaxy S25"}
HUB_MODELS = {
    "beit": ("beit_base_patch16_224", 224),
    "convnext_tiny": ("convnext_tiny", 224),
    "densenet121": ("densenet121", 224),
    "dla102x": ("dla102x", 224),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientnet_b0": ("efficientnet_b0", 224),
    "efficientnet_v2_s": ("tf_efficientnetv2_s", 384),
    "efficientvit_b2_cls": ("efficientvit_b2", 224),
    "efficientvit_l2_cls": ("efficientvit_l2", 224),
    "inception_v3": ("inception_v3", 224),
    "levit": ("levit_128s", 224),
    "mnasnet05": ("mnasnet_050", 224),
    "mobile_vit": ("mobilevit_s", 224),
    "mobilenet_v2": ("mobilenetv2_100", 224),
    "mobilenet_v3_large": ("mobilenetv3_large_100", 224),
    "mobilenet_v3_small": ("mobilenetv3_small_100", 224),
    "regnet": ("regnetx_032", 224),
    "regnet_y_800mf": ("regnety_008", 224),
    "resnet18": ("resnet18", 224),
    "resnet50": ("resnet50", 224),
    "resnext50": ("resnext50_32x4d", 224),
    "shufflenet_v2": ("pytorchcv:shufflenetv2_wd2", 224),
    "squeezenet1_1": ("pytorchcv:squeezenet_v1_1", 224),
    "vit": ("vit_base_patch16_224", 224),
}
"""Identified by the checkpoint, the resolution and the parameters that each model's card states."""

_LINEAR = "attention on ReLU features without softmax, an operator set no slimnas network has"
HUB_LEFT_OUT = {
    "efficientnet_v2_s": "384 pixels; the table is for 224",
    "efficientvit_b2_cls": _LINEAR,
    "efficientvit_l2_cls": _LINEAR,
    "googlenet": "neither in timm nor in pytorchcv, so its operators cannot be traced",
    "nasnet": "its resolution is not stated",
    "sequencer2d": "LSTM layers, unrolled into 17,706 operators",
}

TFLITE_SOURCE = "qed-usc/mobile-ml-benchmark, TFLite end to end (MIT)"
TFLITE_TABLES = {
    "pixel4-cpu": "pixel4|1large|float|mean",
    "galaxy-s10-cpu": "s10|1large|float|mean",
    "galaxy-a03s-cpu": "a03s|1large|float|mean",
}
TFLITE_TRANSFORMERS = {
    "deit-tiny-distilled-patch16-224": ("deit_tiny_distilled_patch16_224", 224),
    "deit-small-distilled-patch16-224": ("deit_small_distilled_patch16_224", 224),
    "deit-base-distilled-patch16-224": ("deit_base_distilled_patch16_224", 224),
    "deit-base-distilled-patch16-384": ("deit_base_distilled_patch16_384", 384),
    "efficientformer-l1-300": ("efficientformer_l1", 224),
    "efficientformer-l3-300": ("efficientformer_l3", 224),
    "efficientformer-l7-300": ("efficientformer_l7", 224),
    "mobilevit-small": ("mobilevit_s", 256),
    "mobilevit-x-small": ("mobilevit_xs", 256),
    "mobilevit-xx-small": ("mobilevit_xxs", 256),
    "swin-tiny-patch4-window7-224": ("swin_tiny_patch4_window7_224", 224),
    "swin-small-patch4-window7-224": ("swin_small_patch4_window7_224", 224),
    "swin-base-patch4-window7-224": ("swin_base_patch4_window7_224", 224),
    "swin-base-patch4-window12-384": ("swin_base_patch4_window12_384", 384),
    "vit-base-patch16-224-in21k": ("vit_base_patch16_224", 224),
    "vit-base-patch16-384": ("vit_base_patch16_384", 384),
    "vit-base-patch32-224-in21k": ("vit_base_patch32_224", 224),
    "vit-base-patch32-384": ("vit_base_patch32_384", 384),
}
GROUPED = ("regnet", "resnext")
GROUPED_REASON = (
    "grouped convolutions of several channels, which TFLite runs many times slower and which no "
    "slimnas network has"
)


def hub_points(path: Path, device: str) -> Iterator[Point]:
    """Float networks on the NPU of `device` through the QNN runtime."""
    for row in _rows(path):
        if (row["device"], row["runtime"], row["precision"]) != (device, "qnn_dlc", "float"):
            continue
        if row["unit"] != "NPU":
            continue
        source = HUB_SOURCE.format(row["model"])
        known = HUB_MODELS.get(row["model"], ("", 0))
        reason = HUB_LEFT_OUT.get(row["model"], "")
        yield _point(row["model"], *known, float(row["ms"]), source, reason)


def tflite_points(cnns: Path, transformers: Path, column: str) -> Iterator[Point]:
    """Float networks on one core; their MACs and sizes in the data identify each."""
    for row in _rows(cnns):
        reason = GROUPED_REASON if row["model"].startswith(GROUPED) else ""
        model, latency_ms = f"pytorchcv:{row['model']}", float(row[column]) / 1e3
        yield _point(row["model"], model, 224, latency_ms, TFLITE_SOURCE, reason)
    for row in _rows(transformers):
        known = TFLITE_TRANSFORMERS.get(row["model"], ("", 0))
        reason = "" if known[0] else "not in timm, so its operators cannot be traced"
        yield _point(row["model"], *known, float(row[column]) / 1e3, TFLITE_SOURCE, reason)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def _point(
    name: str, model: str, resolution: int, latency_ms: float, source: str, reason: str
) -> Point:
    return Point(
        name=model if model in FAMILY else name,
        model=model,
        resolution=resolution,
        features=None,
        latency_ms=latency_ms,
        weight=FAMILY_WEIGHT if model in FAMILY else 1.0,
        tag="D",
        source=source,
        used=not reason,
        why_not=reason,
    )


def main() -> None:
    """Write the points of every phone table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--ai-hub", "--tflite-cnn", "--tflite-transformer"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args()
    found = {table: hub_points(given.ai_hub, device) for table, device in HUB_TABLES.items()}
    for table, column in TFLITE_TABLES.items():
        found[table] = tflite_points(given.tflite_cnn, given.tflite_transformer, column)
    for table, points in found.items():
        (TABLES / table).mkdir(exist_ok=True)
        (TABLES / table / POINTS_FILE).write_text(points_to_csv(points), encoding="utf-8")


if __name__ == "__main__":
    main()
