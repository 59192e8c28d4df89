"""The recipe of a supernet: defaults, a space's file, flags; what each setting changes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import SEARCH, SPACE, lay_out, slimnas
from supernet_cases import RESOLUTION, micro_space

from slimnas.arch.space import SearchSpace, shipped_spaces
from slimnas.data.splits import SearchData, open_data
from slimnas.errors import SpecError
from slimnas.search.checks import require_fitting, space_digest
from slimnas.search.config import SearchConfig
from slimnas.supernet.recipe import SupernetRecipe, recipe_for, space_recipe
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import (
    Progress,
    TrainedSupernet,
    load_supernet,
    save_supernet,
    supernet_task,
    train_supernet,
    weights_digest,
)
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import start, train_step

CPU = accelerator_for("cpu")
WITH_RECIPE = SPACE.replace(
    "supernet: {resolution: 32}",
    "supernet:\n  resolution: 32\n  recipe: {epochs: 3, alpha_warmup: 0.25, sandwich: 1}",
)
RECIPE = SupernetRecipe(epochs=2, batch_size=24, lr=4e-3)


@cache
def digits() -> SearchData:
    options = {"resolution": (RESOLUTION, RESOLUTION), "channels": 3, "seed": 0}
    return open_data("digits", max_images=120, **options).for_search()


def fresh() -> Supernet:
    return Supernet(micro_space().with_classes(10), resolution=RESOLUTION, seed=0)


def alphas_of(supernet: Supernet) -> list[float]:
    return [a for stage in supernet.alphas() for slot in stage for a in slot.values()]


@pytest.mark.parametrize("mixing", ["sampled", "soft"])
def test_alpha_waits_and_its_moments_with_it(mixing: str) -> None:
    recipe = RECIPE.model_copy(update={"alpha_warmup": 0.5, "epochs": 2, "mixing": mixing})
    supernet = fresh()
    task = supernet_task(supernet, digits().train, recipe, seed=3)
    state = start(task, CPU)
    waiting = recipe.waiting_steps(task.steps)
    assert 0 < waiting == task.steps // 2
    alphas = [path.alpha for path in supernet.meta_paths()]
    step = 0
    for epoch in range(recipe.epochs):
        batches = digits().train.batches(24, device="cpu", seed=3, epoch=epoch, augment=True)
        for images, labels in batches:
            weights = weights_digest(supernet)
            train_step(task, state, CPU, images, labels)
            step += 1
            assert weights_digest(supernet) != weights
            if step <= waiting:
                assert not any(alpha.any() for alpha in alphas)
                assert not any(state.optimizer.state[alpha] for alpha in alphas)
    assert step == task.steps
    assert all(alpha.any() for alpha in alphas)
    steps_of_alpha = max(float(state.optimizer.state[alpha]["step"]) for alpha in alphas)
    assert steps_of_alpha == task.steps - waiting


def test_before_alpha_moves_every_choice_is_as_likely() -> None:
    supernet = fresh()
    recipe = RECIPE.model_copy(update={"alpha_warmup": 0.9})
    task = supernet_task(supernet, digits().train, recipe, seed=0)
    seen = [torch.zeros(len(path.choices)) for path in supernet.meta_paths()]
    images, labels = torch.randn(2, 3, RESOLUTION, RESOLUTION), torch.tensor([0, 1])
    routed: list[Any] = []

    class Model(torch.nn.Module):
        def forward(self, images: torch.Tensor, routes: Any) -> torch.Tensor:
            routed.append(routes)
            return torch.zeros(len(images), 10)

    for seed in range(600):
        task = supernet_task(supernet, digits().train, recipe, seed=seed)
        task.loss(Model(), images, labels, 0)
    for routes in routed:
        for counts, route in zip(seen, routes, strict=True):
            assert route.weights is None
            counts[route.index] += 1
    for counts in seen:
        share = 1 / len(counts)
        error = math.sqrt(share * (1 - share) / len(routed))
        assert torch.allclose(counts / len(routed), torch.tensor(share), atol=5 * error)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cosine"])
@pytest.mark.parametrize("alpha_warmup", [0.0, 0.3])
def test_temperature_waits_for_alpha_and_then_falls(schedule: str, alpha_warmup: float) -> None:
    recipe = SupernetRecipe.model_validate(
        {"tau_schedule": schedule, "alpha_warmup": alpha_warmup, "tau_start": 3, "tau_end": 0.5}
    )
    taus = [recipe.tau(step, 101) for step in range(101)]
    waiting = recipe.waiting_steps(101)
    assert waiting == round(101 * alpha_warmup)
    assert taus[: waiting + 1] == [3.0] * (waiting + 1)
    assert taus[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(taus[waiting:], taus[waiting + 1 :], strict=False))
    middle = taus[(waiting + 100) // 2] if (waiting + 100) % 2 == 0 else None
    if middle is not None:
        want = {"exponential": math.sqrt(3 * 0.5), "linear": 1.75, "cosine": 1.75}[schedule]
        assert middle == pytest.approx(want)


def test_schedules_have_their_shapes() -> None:
    def at(schedule: str, share: float) -> float:
        recipe = SupernetRecipe.model_validate({"tau_schedule": schedule})
        return recipe.tau(round(share * 100), 101)

    assert at("exponential", 0.25) == pytest.approx(4 * 0.25**0.25)
    assert at("linear", 0.25) == pytest.approx(3.25)
    assert at("cosine", 0.25) == pytest.approx(1 + 3 * 0.5 * (1 + math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sandwich_distillation": True}, "sandwich_distillation: needs the largest network"),
        ({"compile": True}, "compile: must be false"),
        ({"sandwich": -1}, "sandwich: must be at least 0, got -1"),
        ({"alpha_warmup": 1.0}, r"alpha_warmup: must be below 1\.0"),
        ({"tau_schedule": "linea"}, r"tau_schedule: .*did you mean 'linear'"),
        ({"alpha_betas": [0.9, 1.0]}, r"alpha_betas\[1\]: must be below 1\.0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(changes: dict[str, Any], message: str) -> None:
    space = SearchSpace.from_yaml(SPACE)
    proxy = space.supernet.model_copy(update={"recipe": changes})
    space = space.model_copy(update={"supernet": proxy})
    with pytest.raises(SpecError, match=r"my\.yaml: supernet\.recipe.*" + message) as caught:
        space_recipe(space, source="my.yaml")
    assert "\n" not in str(caught.value)


def test_flags_override_the_space_and_the_space_the_defaults() -> None:
    plain, given = SearchSpace.from_yaml(SPACE), SearchSpace.from_yaml(WITH_RECIPE)
    assert space_recipe(plain, source="") == SupernetRecipe()
    assert recipe_for(plain, {}, source="") == SupernetRecipe()
    assert space_recipe(given, source="") == SupernetRecipe(epochs=3, alpha_warmup=0.25, sandwich=1)
    both = recipe_for(given, {"epochs": 5, "sandwich": 0}, source="")
    assert both == SupernetRecipe(epochs=5, alpha_warmup=0.25, sandwich=0)
    with pytest.raises(SpecError, match="command line: lr: must be above 0"):
        recipe_for(given, {"lr": -1.0}, source="space.yaml")


def test_a_recipe_is_no_part_of_what_a_space_is() -> None:
    plain, given = SearchSpace.from_yaml(SPACE), SearchSpace.from_yaml(WITH_RECIPE)
    assert space_digest(given) == space_digest(plain)
    assert given.without_recipe() == plain
    assert SearchSpace.from_yaml(given.to_yaml()) == given
    assert "recipe" not in plain.to_yaml()
    for name in shipped_spaces():
        space = SearchSpace.load(name)
        space_recipe(space, source=name)  # whatever is in it can be used
    supernet = Supernet(given, resolution=RESOLUTION, seed=0)
    trained = TrainedSupernet(supernet, "", {"data": digits().digest})
    require_fitting(trained, plain, digits(), RESOLUTION)


@pytest.mark.parametrize(
    ("recorded", "recipe"),
    [
        ({"epochs": 3}, SupernetRecipe(epochs=3)),  # an older version knew fewer settings
        (SupernetRecipe(sandwich=2).model_dump(mode="json"), SupernetRecipe(sandwich=2)),
        ({"epochs": 3, "of_the_future": 1}, None),
        (None, None),
    ],
)
def test_how_a_supernet_was_trained_is_read_back(
    recorded: Any, recipe: SupernetRecipe | None, tmp_path: Path
) -> None:
    supernet = fresh().eval()
    digest = weights_digest(supernet)
    save_supernet(tmp_path / "s", TrainedSupernet(supernet, digest, {"recipe": recorded}))
    loaded = load_supernet(tmp_path / "s")
    assert loaded.recipe == recipe
    order = loaded.channel_order()
    assert (order is not None) == (recipe is not None and recipe.sandwich > 1)
    if order is not None:
        assert order["stages.3"].tolist() == list(range(20))


OTHERS: dict[str, dict[str, Any]] = {
    "waiting": {"alpha_warmup": 0.5},
    "linear": {"tau_schedule": "linear"},
    "change": {"alpha_gradient": "change"},
    "largest": {"sandwich": 1},
    "sandwich": {"sandwich": 3},
    "distilled": {"sandwich": 2, "sandwich_distillation": True},
}


class StoppedError(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("name", list(OTHERS))
def test_every_setting_counts_and_can_be_interrupted(name: str, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update=OTHERS[name])

    def train(used: SupernetRecipe, **options: Any) -> str:
        return train_supernet(fresh(), digits(), used, CPU, seed=3, **options).digest

    whole = train(recipe)
    assert whole != train(RECIPE)

    def stop(progress: Progress) -> None:
        if progress.report.step == progress.report.steps // 2 + 1:
            raise StoppedError("on purpose")

    checkpoint = tmp_path / "state.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimnas.train.loop.CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(StoppedError, match="on purpose"):
            train(recipe, checkpoint=checkpoint, on_progress=stop)
    assert checkpoint.is_file()
    assert train(recipe, checkpoint=checkpoint) == whole


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    (tmp_path / "space.yaml").write_text(WITH_RECIPE)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimnas.search.run.train_supernet", stopped)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ([], SupernetRecipe(epochs=1, alpha_warmup=0.25, sandwich=1)),
        (
            [
                "--alpha-warmup",
                "0",
                "--sandwich",
                "2",
                "--mixing",
                "soft",
                "--noise",
                "uniform",
                "--alpha-gradient",
                "change",
            ],
            SupernetRecipe(
                epochs=1, sandwich=2, mixing="soft", noise="uniform", alpha_gradient="change"
            ),
        ),
    ],
)
def test_the_run_folder_says_what_became_of_it(
    flags: list[str], recipe: SupernetRecipe, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms", *flags)
    assert answer.code == 130, answer.err
    (file,) = (world / "runs").rglob("config.yaml")
    assert SearchConfig.load(file).recipe == recipe


def test_a_faulty_recipe_is_one_line_with_file_and_key(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "space.yaml").write_text(WITH_RECIPE.replace("sandwich:", "sandwitch:"))
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms")
    assert answer.code == 1
    (line,) = answer.errors
    assert line.startswith("space.yaml: supernet.recipe: unknown key 'sandwitch' (did you mean 's")
    assert not (world / "runs").exists()


def test_validate_looks_at_the_recipe(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slimnas(capsys, "space", "validate", "space.yaml").code == 0
    (world / "space.yaml").write_text(WITH_RECIPE.replace("sandwich: 1", "sandwich: lots"))
    answer = slimnas(capsys, "space", "validate", "space.yaml")
    assert answer.code == 1
    (line,) = answer.errors
    assert line == "space.yaml: supernet.recipe.sandwich: must be a whole number, got 'lots'"
