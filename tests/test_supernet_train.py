"""Training a supernet on real digits: it learns, stops, goes on, and is saved and read back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from supernet_cases import RESOLUTION, micro_space
from torch import nn
from torch.nn.functional import cross_entropy

from slimnas.data.splits import SearchData, open_data
from slimnas.errors import WeightsError
from slimnas.nn.tensorfiles import load_tensors, save_tensors
from slimnas.supernet.gumbel import temperature
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import (
    Progress,
    SupernetRecipe,
    TrainedSupernet,
    load_supernet,
    route_generator,
    save_supernet,
    supernet_task,
    train_supernet,
    weights_digest,
)
from slimnas.train import loop
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import start, train_step

RECIPE = SupernetRecipe(epochs=2, batch_size=24, lr=4e-3)
CPU = accelerator_for("cpu")


@cache
def digits() -> SearchData:
    options = {"resolution": (RESOLUTION, RESOLUTION), "channels": 3, "seed": 0}
    return open_data("digits", max_images=120, **options).for_search()


def fresh(seed: int = 0) -> Supernet:
    return Supernet(micro_space().with_classes(10), resolution=RESOLUTION, seed=seed)


def train(recipe: SupernetRecipe = RECIPE, **options: object) -> TrainedSupernet:
    return train_supernet(fresh(), digits(), recipe, CPU, **{"seed": 3, **options})


class StoppedError(Exception):
    """Stands for whatever ends a run."""


def test_progress_tells_step_temperature_and_search_accuracy() -> None:
    told: list[Progress] = []
    trained = train(on_progress=told.append)
    steps = 2 * digits().train.steps(24)
    after_steps = [p for p in told if p.search_top1 is None]
    after_epochs = [p for p in told if p.search_top1 is not None]
    assert [p.report.step for p in after_steps] == list(range(1, steps + 1))
    assert [p.report.step for p in after_epochs] == [steps // 2, steps]
    assert after_steps[0].tau == RECIPE.tau_start
    assert after_steps[-1].tau == pytest.approx(RECIPE.tau_end)
    assert all(0 <= p.search_top1 <= 100 for p in after_epochs if p.search_top1 is not None)
    assert trained.digest == weights_digest(trained.supernet)
    assert not trained.supernet.training
    by_hand = [
        (trained.supernet(images, trained.supernet.likeliest_routes()).argmax(1) == labels).double()
        for images, labels in digits().search.eval_batches(7, device="cpu")
    ]
    assert after_epochs[-1].search_top1 == pytest.approx(100 * torch.cat(by_hand).mean().item())


def test_learns_digits_and_moves_the_alphas() -> None:
    recipe = RECIPE.model_copy(update={"epochs": 12})
    losses: list[float] = []

    def on_progress(progress: Progress) -> None:
        if progress.search_top1 is not None:
            losses.append(progress.report.loss)

    trained = train(recipe, on_progress=on_progress)
    assert losses[-1] < losses[0] - 0.4
    alphas = [a for stage in trained.supernet.alphas() for slot in stage for a in slot.values()]
    assert max(alphas) > 0 > min(alphas)


@pytest.mark.parametrize("mixing", ["sampled", "soft"])
def test_interrupted_training_ends_with_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixing: str
) -> None:
    recipe = RECIPE.model_copy(update={"mixing": mixing})
    uninterrupted = train(recipe)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    steps = 2 * digits().train.steps(24)
    for stop in (2, steps // 2 + 1, steps):
        checkpoint = tmp_path / f"{stop}.safetensors"

        def on_progress(progress: Progress, stop: int = stop) -> None:
            if progress.report.step == stop:
                raise StoppedError("stopped on purpose")

        with pytest.raises(StoppedError, match="on purpose"):
            train(recipe, checkpoint=checkpoint, on_progress=on_progress)
        assert train(recipe, checkpoint=checkpoint).digest == uninterrupted.digest
    assert train(recipe, seed=4).digest != uninterrupted.digest


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    recipe = RECIPE.model_copy(update={"epochs": 1})
    train(recipe, checkpoint=checkpoint)
    others: list[dict[str, object]] = [
        {"recipe": recipe.model_copy(update={"lr": 1e-3})},
        {"recipe": recipe.model_copy(update={"tau_end": 0.5})},
        {"recipe": recipe, "seed": 9},
    ]
    for options in others:
        with pytest.raises(WeightsError, match="other settings, data or seed") as caught:
            train(checkpoint=checkpoint, **options)
        assert "\n" not in str(caught.value)


def test_only_the_sampled_path_is_touched() -> None:
    supernet = fresh()
    task = supernet_task(supernet, digits().train, RECIPE, seed=3)
    state = start(task, CPU)
    batches = digits().train.batches(24, device="cpu", seed=3, epoch=0, augment=True)
    off_path = 0
    for step, (images, labels) in zip(range(3), batches, strict=False):
        before = {n: p.detach().clone() for n, p in supernet.named_parameters()}
        moments = {
            n: {k: v.clone() for k, v in state.optimizer.state[p].items()}
            for n, p in supernet.named_parameters()
        }
        routes = supernet.draw_routes(
            RECIPE.tau(step, task.steps),
            mixing="sampled",
            noise="gumbel",
            generator=route_generator(3, step),
        )
        blocks = {
            f"{name}.blocks.{path.choices[route.index]}."
            for (name, path), route in zip(meta_paths(supernet), routes, strict=True)
            if route.index is not None
        }
        train_step(task, state, CPU, images, labels)
        for name, parameter in supernet.named_parameters():
            on_path = ".blocks." not in name or any(name.startswith(b) for b in blocks)
            assert torch.equal(parameter, before[name]) != on_path, name
            if not on_path:
                kept = state.optimizer.state[parameter]
                assert kept.keys() == moments[name].keys()
                assert all(torch.equal(kept[k], moments[name][k]) for k in kept)
                off_path += 1
    assert off_path > 100


def meta_paths(supernet: Supernet) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in supernet.named_modules() if hasattr(m, "alpha")]


def test_alpha_has_its_own_settings() -> None:
    supernet = fresh()
    recipe = RECIPE.model_copy(update={"alpha_lr": 0.5, "alpha_weight_decay": 0.25})
    groups = supernet_task(supernet, digits().train, recipe, seed=0).groups
    names = {id(p): n for n, p in supernet.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert members[2] == {n for n in names.values() if n.endswith(".alpha")}
    assert len(set.union(*members)) == sum(len(m) for m in members) == len(names)
    assert (groups[2]["lr"], groups[2]["weight_decay"]) == (0.5, 0.25)
    assert [group["lr"] for group in groups[:2]] == [recipe.lr] * 2


def test_loss_of_a_step_is_that_of_its_routes() -> None:
    supernet = fresh().eval()
    task = supernet_task(supernet, digits().train, RECIPE, seed=6)
    images, labels = next(digits().train.batches(8, device="cpu", seed=0, epoch=0, augment=False))
    for step in (0, 4):
        tau = temperature(step / (task.steps - 1), RECIPE.tau_start, RECIPE.tau_end)
        generator = route_generator(6, step)
        routes = supernet.draw_routes(tau, mixing="sampled", noise="gumbel", generator=generator)
        want = cross_entropy(supernet(images, routes), labels, label_smoothing=0.1)
        assert task.loss(supernet, images, labels, step).item() == want.item()


def test_route_generator_depends_on_seed_and_step_alone() -> None:
    states = {
        (seed, step): route_generator(seed, step).initial_seed()
        for seed in range(4)
        for step in range(25)
    }
    assert len(set(states.values())) == 100
    assert states[(2, 3)] == route_generator(2, 3).initial_seed()


def test_saved_supernet_is_read_back_and_always_the_same_bytes(tmp_path: Path) -> None:
    trained = train(RECIPE.model_copy(update={"epochs": 1}))
    save_supernet(tmp_path / "a.safetensors", trained)
    loaded = load_supernet(tmp_path / "a.safetensors")
    save_supernet(tmp_path / "b.safetensors", loaded)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert loaded.digest == trained.digest
    assert loaded.provenance == trained.provenance
    assert loaded.supernet.space == trained.supernet.space
    assert not loaded.supernet.training
    images = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    routes = trained.supernet.likeliest_routes()
    assert torch.equal(loaded.supernet(images, routes), trained.supernet(images, routes))


def untrained(path: Path) -> Path:
    supernet = fresh().eval()
    save_supernet(path, TrainedSupernet(supernet, weights_digest(supernet), {"seed": 0}))
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(WeightsError, match=match) as caught:
        load_supernet(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_altered_supernet_is_refused(tmp_path: Path) -> None:
    path = untrained(tmp_path / "s.safetensors")
    tensors, metadata = load_tensors(path, "a test")
    changed = {n: t.clone() for n, t in tensors.items()}
    changed["stem.conv1.bias"][0] += 1e-3
    save_tensors(path, changed, metadata)
    refused(path, "do not match its digest")
    cases = [
        ({k: v for k, v in tensors.items() if k != "stem.conv1.bias"}, metadata, "not a supernet"),
        (tensors, {**metadata, "schema": "slimnas/supernet/9"}, "schema: must be"),
        (tensors, {**metadata, "resolution": "wide"}, "not a supernet checkpoint"),
        (tensors, {**metadata, "provenance": None}, "not a supernet checkpoint"),
        (tensors, {k: v for k, v in metadata.items() if k != "space"}, "not a supernet checkp"),
        (tensors, {}, "schema: must be"),
    ]
    for given, data, match in cases:
        save_tensors(path, given, data)
        refused(path, match)


def test_damaged_supernet_is_refused(tmp_path: Path) -> None:
    path = untrained(tmp_path / "s.safetensors")
    data = path.read_bytes()
    for length in (0, 5, 8, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "damaged or not safetensors")
    refused(tmp_path / "none.safetensors", "no such file; expected a supernet checkpoint")


@pytest.mark.parametrize("text", ["[1, 2]", '"text"', "no json", "7"])
def test_foreign_metadata_is_refused(tmp_path: Path, text: str) -> None:
    path = untrained(tmp_path / "s.safetensors")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"slimnas": text}
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
    refused(path, "damaged or not safetensors|not a supernet")
