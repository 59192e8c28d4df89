"""Shipped recipes against what the papers' codes set, and what a recipe may not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from measure_fakes import small_model

from slimnas.data.batches import ImageSet, MemoryPixels, Split
from slimnas.errors import SlimnasError, SpecError
from slimnas.nn.build import build
from slimnas.nn.regularisation import set_drop_path, set_layer_scale
from slimnas.train import loop
from slimnas.train.augment import AugmentedImages
from slimnas.train.devices import accelerator_for
from slimnas.train.losses import network_loss
from slimnas.train.network_recipe import CropSpec, NetworkRecipe, RandAugmentSpec
from slimnas.train.recipe import TrainRecipe
from slimnas.train.recipes import (
    RECIPES,
    SCHEMA,
    load_recipe,
    override_recipe,
    recipe_yaml,
    shipped_recipes,
)

NAMES = ["efficientformer", "efficientvit", "finetune", "litv2", "quick"]
OF_PAPERS = ["efficientformer", "efficientvit", "litv2"]
COMMON = {
    "epochs": 300,
    "min_lr": 1e-5,
    "eps": 1e-8,
    "beta2": 0.999,
    "label_smoothing": 0.1,
    "randaugment": RandAugmentSpec(n=2, magnitude=9, std=0.5),
    "color_jitter": 0.4,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_prob": 1.0,
    "mix_switch": 0.5,
    "erasing": 0.25,
    "augment": True,
}
OWN: dict[str, dict[str, Any]] = {
    "efficientformer": {
        "lr": 1e-3,
        "weight_decay": 0.025,
        "warmup_epochs": 5,
        "warmup_lr": 1e-5,
        "clip": "agc",
        "clip_norm": 0.01,
        "ema_decay": 0.99996,
        "sync_bn": True,
        "repeats": 3,
        "distillation": "hard",
        "distillation_weight": 0.5,
        "temperature": 1.0,
    },
    "efficientvit": {
        "lr": 4e-3,
        "batch_size": 2048,
        "weight_decay": 0.025,
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "clip": "agc",
        "clip_norm": 0.02,
        "ema_decay": 0.99996,
        "repeats": 3,
        "distillation": "none",
    },
    "litv2": {
        "lr": 1e-3,
        "batch_size": 1024,
        "weight_decay": 0.05,
        "warmup_epochs": 20,
        "warmup_lr": 1e-6,
        "clip": "norm",
        "clip_norm": 5.0,
        "ema_decay": 0.0,
        "repeats": 1,
        "drop_path": 0.2,
        "distillation": "none",
    },
}


def write(folder: Path, **body: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"schema": SCHEMA, **body}))
    return path


def test_these_ship() -> None:
    assert shipped_recipes() == NAMES
    assert all(isinstance(load_recipe(name), NetworkRecipe) for name in NAMES)


@pytest.mark.parametrize("name", OF_PAPERS)
def test_values_are_the_released_codes(name: str) -> None:
    recipe = load_recipe(name).scaled()
    for key, value in {**COMMON, **OWN[name]}.items():
        wanted = pytest.approx(value) if isinstance(value, float) else value
        assert getattr(recipe, key) == wanted, key
    assert recipe.crop is not None
    assert recipe.crop.scale == (0.08, 1.0)
    assert recipe.crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert recipe.crop.interpolation == "bicubic"


@pytest.mark.parametrize("name", NAMES)
def test_every_value_says_where_it_is_from(name: str) -> None:
    """Recipes of papers line by line; of our own the header says that all is our choice."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+:", line) and not line.startswith("schema")]
    assert len(values) >= 11
    if name in OF_PAPERS:
        plain = [line for line in values if "#" not in line]
        assert plain == []
        tagged = [line for line in values if re.search(r"\[(code|paper|ours)\]", line)]
        assert len(tagged) >= len(values) - 1
        assert "github.com/" in "\n".join(lines[:6])
    else:
        assert "Every value is our choice" in "\n".join(lines[:4])
    assert len({line.partition(":")[0] for line in values}) == len(values)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_its_document(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "copy.yaml"
    path.write_text(recipe_yaml(recipe))
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe


def test_defaults_are_the_base_recipes() -> None:
    base, own = TrainRecipe().model_dump(), NetworkRecipe().model_dump()
    assert {key: own[key] for key in base} == base


@pytest.mark.parametrize(
    ("batch_size", "lr"), [(512, 1e-3), (2048, 4e-3), (128, 2.5e-4), (1, 1e-5)]
)
def test_the_learning_rate_follows_the_batch(batch_size: int, lr: float) -> None:
    recipe = NetworkRecipe(
        lr=1e-3, min_lr=1e-5, lr_reference_batch=512, batch_size=batch_size
    ).scaled()
    assert recipe.lr == pytest.approx(lr)
    assert recipe.scaled() == recipe
    assert NetworkRecipe(lr=1e-3, batch_size=batch_size).scaled().lr == 1e-3


def test_overriding_checks_like_reading() -> None:
    recipe = load_recipe("efficientvit")
    changed = override_recipe(recipe, {"epochs": 3, "randaugment": {"magnitude": 5}})
    assert changed.epochs == 3
    assert changed.randaugment == RandAugmentSpec(n=2, magnitude=5, std=0.5)
    assert override_recipe(recipe, {"crop": None}).crop is None
    assert override_recipe(recipe, {}) == recipe
    assert recipe.epochs == 300
    with pytest.raises(SpecError, match=r"^--set: unknown key 'epoch' \(did you mean 'epochs'\?\)"):
        override_recipe(recipe, {"epoch": 3}, source="--set")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficentformer", r"^no recipe or file 'efficentformer' \(did you mean 'efficientformer'"),
        ("zzz", r"^no recipe or file 'zzz'; shipped recipes: efficientformer, efficientvit, "),
        ("gone.yaml", r"^gone.yaml: .*no such file|^gone.yaml: "),
    ],
)
def test_an_unknown_recipe_is_one_line(name: str, message: str) -> None:
    with pytest.raises(SlimnasError, match=message) as caught:
        load_recipe(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"mixpu": 1}, r"unknown key 'mixpu' \(did you mean 'mixup'\?\)"),
        ({"mix_prob": 1.5}, r"mix_prob: must be at most 1"),
        ({"epochs": 0}, r"epochs: must be at least 1"),
        ({"repeats": 1.5}, r"repeats: must be a whole number"),
        ({"drop_path": 1.0}, r"drop_path: must be below 1"),
        ({"erasing": -0.1}, r"erasing: must be at least 0"),
        ({"clip": "acg"}, r"clip: must be .*got 'acg' \(did you mean 'agc'\?\)"),
        ({"distillation": "hard"}, r"distillation 'hard' needs a teacher"),
        ({"randaugment": {"magnitude": 11}}, r"randaugment.magnitude: must be at most 10"),
        ({"randaugment": {"m": 9}}, r"randaugment: unknown key 'm'"),
        ({"crop": {"scale": [0.5, 0.1]}}, r"crop: scale must be \[smallest, largest\]"),
        ({"crop": {"scale": [0.5, 1.5]}}, r"crop: scale must lie within the image"),
        ({"crop": {"ratio": [0.0, 1.0]}}, r"crop.ratio\[0\]: must be above 0"),
        ({"crop": {"interpolation": "cubic"}}, r"crop.interpolation: .*did you mean 'bicubic'"),
    ],
)
def test_bad_recipes_name_file_and_key(body: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **body)
    with pytest.raises(SpecError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_other_documents_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("schema: slimnas/search-space/1\n")
    with pytest.raises(
        SpecError, match=r"schema: must be 'slimnas/recipe/1' for a training recipe"
    ):
        load_recipe(path)


def test_crops_keep_their_defaults() -> None:
    assert CropSpec() == CropSpec(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic")


def task_of(recipe: NetworkRecipe) -> loop.TrainTask:
    """A small network that learns to tell grey levels apart, as `recipe` says."""
    labels = torch.arange(48) % 10
    noise = torch.randint(0, 40, (48, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels = (20 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    images = ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, (0.4,) * 3, (0.25,) * 3, True)
    network = build(small_model("efficientformer"), seed=1)
    set_drop_path(network, recipe.drop_path)
    set_layer_scale(network, 0.1)
    teacher = build(small_model("efficientformer"), seed=2)
    return loop.TrainTask(
        model=network,
        groups=loop.decay_groups(dict(network.named_parameters()), recipe),
        loss=network_loss(recipe, teacher),
        images=AugmentedImages(images, recipe, 10, smoothing=recipe.label_smoothing),
        recipe=recipe,
        seed=3,
    )


@pytest.mark.parametrize("name", OF_PAPERS)
def test_a_run_goes_on_as_if_it_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that a paper's recipe has: channels-last weights, mixing, a teacher, drop path."""
    small = {"epochs": 2, "batch_size": 12, "lr_reference_batch": 12, "warmup_epochs": 0}
    recipe = override_recipe(load_recipe(name), {**small, "drop_path": 0.2}).scaled()
    accelerator = accelerator_for("cpu")
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    wanted: list[float] = []
    whole = loop.fit(
        task_of(recipe), accelerator, watch=loop.Watch(lambda report: wanted.append(report.loss))
    )
    given: list[float] = []

    def stop_once(report: loop.StepReport) -> None:
        given.append(report.loss)
        if len(given) == 3:
            raise LookupError("stopped")

    path = tmp_path / "state.safetensors"
    watch = loop.Watch(stop_once)
    with pytest.raises(LookupError, match="stopped"):
        loop.fit(task_of(recipe), accelerator, checkpoint=path, watch=watch)
    resumed = loop.fit(task_of(recipe), accelerator, checkpoint=path, watch=watch)
    assert given[:2] + given[3:] == wanted  # the step that was stopped is done again
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
