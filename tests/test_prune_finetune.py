"""Fine-tuning with distillation: the loss by closed form, and what training does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prune_cases import ARCHITECTURES, FAMILIES
from prune_world import ARCHITECTURE, budget, calibration, network, prune

from slimnas.arch.documents import parse_spec
from slimnas.data.batches import ImageSet, MemoryPixels, Split
from slimnas.errors import SpecError, WeightsError
from slimnas.nn.build import build
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.prune.apply import apply_plan
from slimnas.prune.finetune import FinetuneRecipe, distillation_loss, evaluate, finetune
from slimnas.prune.widths import WidthPlan
from slimnas.train import loop
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import StepReport

RECIPE = FinetuneRecipe(epochs=2, batch_size=20)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(logits: list[float], target: list[float], label: int, recipe: FinetuneRecipe) -> float:
    """The loss of one image, by the definitions."""

    def softmax(values: list[float], temperature: float) -> list[float]:
        powers = [math.exp(value / temperature) for value in values]
        return [power / sum(powers) for power in powers]

    smooth = recipe.label_smoothing / len(logits)
    wanted = [smooth + (1 - recipe.label_smoothing) * (k == label) for k in range(len(logits))]
    plain = softmax(logits, 1.0)
    entropy = -sum(w * math.log(p) for w, p in zip(wanted, plain, strict=True))
    mine, its = softmax(logits, recipe.temperature), softmax(target, recipe.temperature)
    divergence = sum(t * math.log(t / m) for m, t in zip(mine, its, strict=True))
    weight = recipe.distillation
    return (1 - weight) * entropy + weight * recipe.temperature**2 * divergence


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_by_closed_form(weight: float, temperature: float) -> None:
    recipe = FinetuneRecipe(distillation=weight, temperature=temperature, label_smoothing=0.1)
    logits, target, label = [0.5, -1.0, 2.0], [1.5, 0.0, -0.5], 1
    found = distillation_loss(
        torch.tensor([logits]), torch.tensor([target]), torch.tensor([label]), recipe
    )
    assert float(found) == pytest.approx(by_hand(logits, target, label, recipe), rel=1e-5)


def test_both_logits_of_a_distilled_head_learn_from_the_teacher() -> None:
    first, second = torch.randn(4, 5), torch.randn(4, 5)
    target, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    recipe = FinetuneRecipe(distillation=1.0)
    pair = distillation_loss((first, second), target, labels, recipe)
    alone = [distillation_loss(x, target, labels, recipe) for x in (first, second)]
    assert float(pair) == pytest.approx(float(sum(alone)) / 2, rel=1e-5)
    by_labels = FinetuneRecipe(distillation=0.0)
    only = distillation_loss((first, second), target, labels, by_labels)
    assert float(only) == pytest.approx(float(distillation_loss(first, target, labels, by_labels)))


def pictures(family: str, count: int = 12) -> ImageSet:
    """Noise of the size and classes of a family's network."""
    shape = ARCHITECTURES[family].input.shape
    generator = torch.Generator().manual_seed(0)
    size = (count, shape.channels, shape.height, shape.width)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % ARCHITECTURES[family].head.classes
    mean = (0.5,) * shape.channels
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, mean, mean, flip=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_nears_the_teacher_in_every_family(family: str) -> None:
    """Distilled heads of ViT and EfficientFormer give pairs in training."""
    teacher = build(ARCHITECTURES[family], seed=1).eval()
    student = build(ARCHITECTURES[family], seed=2).eval()
    images = pictures(family)
    before = tensors_digest(student.state_dict()), tensors_digest(teacher.state_dict())
    recipe = FinetuneRecipe(
        epochs=15, batch_size=12, lr=5e-3, distillation=1.0, augment=False, ema_decay=0.5
    )
    losses: list[float] = []

    def on_step(report: StepReport) -> None:
        losses.append(report.loss)

    tuned = finetune(
        student, teacher, images, recipe, accelerator_for("cpu"), seed=0, on_step=on_step
    )
    assert losses[-1] < 0.5 * losses[0]
    assert not tuned.training
    assert (tensors_digest(student.state_dict()), tensors_digest(teacher.state_dict())) == before
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_it_mends_what_a_cut_broke() -> None:
    """A network that knows the digits loses half of every layer, and learns again."""
    images = calibration(network(), images=400)
    accelerator = accelerator_for("cpu")
    recipe = FinetuneRecipe(epochs=25, batch_size=32, lr=4e-3, distillation=0.0, augment=False)
    taught = finetune(network(), network(), images.images, recipe, accelerator, seed=0)
    full = WidthPlan.full(ARCHITECTURE)
    blocks = {
        name: type(block)(
            heads=block.heads,
            qk=tuple(dims[:4] for dims in block.qk),
            v=tuple(dims[:4] for dims in block.v),
            ffn=block.ffn[:48],
        )
        for name, block in full.blocks.items()
    }
    cut = apply_plan(WidthPlan(full.source, blocks), taught)
    gentle = FinetuneRecipe(epochs=4, batch_size=32, lr=2e-3)
    tuned = finetune(cut, taught, images.images, gentle, accelerator, seed=0)
    known, broken, mended = (evaluate(n, images.test, "cpu") for n in (taught, cut, tuned))
    assert known > broken + 5
    assert mended > broken + 0.4 * (known - broken)


def test_stopped_it_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    images = calibration(network()).images
    whole = finetune(network(), network(), images, RECIPE, accelerator_for("cpu"), seed=0)

    def stop(report: StepReport) -> None:
        if report.step == 4:
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(
            *(network(), network(), images, RECIPE, accelerator_for("cpu")),
            seed=0,
            checkpoint=state,
            on_step=stop,
        )
    steps: list[int] = []
    resumed = finetune(
        *(network(), network(), images, RECIPE, accelerator_for("cpu")),
        seed=0,
        checkpoint=state,
        on_step=lambda report: steps.append(report.step),
    )
    assert steps == [4, 5, 6]
    assert tensors_digest(resumed.state_dict()) == tensors_digest(whole.state_dict())
    other = RECIPE.model_copy(update={"temperature": 3.0})
    with pytest.raises(WeightsError, match="belongs to a run with other settings"):
        finetune(
            *(network(), network(), images, other, accelerator_for("cpu")),
            seed=0,
            checkpoint=state,
        )


def test_a_run_trains_after_every_step_if_asked(tmp_path: Path) -> None:
    settings = {"iterations": 2, "finetune": {"epochs": 1, "batch_size": 20}}
    last = prune(tmp_path / "last", budget("50%", 0.5), **settings).found[0]
    both = prune(tmp_path / "both", budget("50%", 0.5), finetune_between=True, **settings).found[0]
    first = Path("steps/1/metrics.json")
    assert "cut_percent" not in (last.folder / first).read_text()
    assert "cut_percent" in (both.folder / first).read_text()
    assert {"cut_percent", "test_top1_percent"} <= last.metrics.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": 1.5}, "distillation: must be at most 1"),
        ({"temperature": 0}, "temperature: must be above 0"),
        ({"teacher": "big"}, "unknown key 'teacher'"),
    ],
)
def test_bad_recipes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(FinetuneRecipe, changes, source="recipe")
