"""The zoo: entries in and out, weights, names, and every way they can be wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from zoo_cases import METRICS, TINY, save_run, trained

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import SpecError, WeightsError, ZooError
from slimnas.nn.build import build
from slimnas.zoo.create import create_model
from slimnas.zoo.entry import load_entry, save_entry, save_model
from slimnas.zoo.metrics import TOP1, load_metrics, save_metrics, speeds
from slimnas.zoo.registry import add, builtin_names, get, list_entries, zoo_folder
from slimnas.zoo.weights import load_weights, save_weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "runs" / "first")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return tmp_path / "zoo"


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Entries


def test_round_trip(zoo: Path, run: Path) -> None:
    folder = add(run, name="mine", zoo=zoo)
    assert folder == zoo / "mine"
    assert {path.name for path in folder.iterdir()} == {
        "architecture.yaml",
        "weights.safetensors",
        "metrics.json",
        "README.md",
        "exports",
    }
    entry = get("mine", zoo=zoo)
    assert entry.architecture == TINY
    assert entry.architecture.name == entry.name == "mine"
    assert entry.architecture.provenance == TINY.provenance
    assert entry.metrics == METRICS
    network = create_model("mine", pretrained=True, zoo=zoo)
    assert same_state(network.state_dict(), trained().state_dict())
    card = (folder / "README.md").read_text()
    assert f"{cost(TINY).params:,}" in card
    assert "| digits_top1 | 0.97 | slimnas evaluate, 360 test images |" in card


def test_an_entry_is_never_overwritten(zoo: Path, run: Path) -> None:
    add(run, zoo=zoo)
    before = (zoo / "tiny" / "weights.safetensors").read_bytes()
    with pytest.raises(ZooError, match="tiny: exists already; choose another --name"):
        save_entry(zoo, "tiny", architecture=TINY, weights=trained(1).state_dict(), metrics={})
    assert (zoo / "tiny" / "weights.safetensors").read_bytes() == before
    assert [path.name for path in zoo.iterdir()] == ["tiny"]


def test_a_failed_entry_leaves_nothing(zoo: Path) -> None:
    state = trained().state_dict()
    del state["head.head.bias"]
    with pytest.raises(WeightsError, match=r"does not fit tiny: missing head\.head\.bias"):
        save_entry(zoo, "tiny", architecture=TINY, weights=state, metrics=METRICS)
    assert not list(zoo.iterdir())


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b"])
def test_bad_names(zoo: Path, name: str) -> None:
    with pytest.raises(ZooError, match="must be letters, digits"):
        save_entry(zoo, name, architecture=TINY, weights=trained().state_dict(), metrics={})
    assert not zoo.exists()


def test_built_in_names_are_taken(zoo: Path, run: Path) -> None:
    with pytest.raises(ZooError, match="a built-in model has it; choose another --name"):
        add(run, name="efficientformer_l1", zoo=zoo)


def test_a_zoo_needs_weights(zoo: Path, run: Path) -> None:
    (run / "weights.safetensors").unlink()
    with pytest.raises(ZooError, match=r"first: has no weights\.safetensors"):
        add(run, zoo=zoo)


def test_runs_with_several_targets(tmp_path: Path, zoo: Path) -> None:
    run = tmp_path / "run"
    state = trained().state_dict()
    save_model(run / "found" / "2ms", architecture=TINY, weights=state, metrics=METRICS)
    assert load_entry(run).folder == run / "found" / "2ms"
    save_model(run / "found" / "3ms", architecture=TINY, weights=state, metrics=METRICS)
    with pytest.raises(ZooError, match=r"holds several models; name one of .*2ms, .*3ms"):
        load_entry(run)
    assert add(run / "found" / "3ms", name="three", zoo=zoo) == zoo / "three"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no architecture\.yaml there"):
        get(tmp_path)


# Names


def test_everything_that_names_a_model(
    zoo: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run, name="mine", zoo=zoo)
    TINY.save(tmp_path / "other.yaml")
    monkeypatch.setenv("SLIMNAS_ZOO", str(zoo))
    assert get("mine").source == "zoo"
    assert get("efficientformer_l3").source == "built-in"
    assert get(run).source == get(run / "architecture.yaml").source == "folder"
    assert get(run / "architecture.yaml").weights == run / "weights.safetensors"
    assert get(tmp_path / "other.yaml").source == "file"
    assert get(zoo / "mine").architecture == TINY


def test_where_the_zoo_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMNAS_ZOO", raising=False)
    assert zoo_folder() == Path("model_zoo")
    monkeypatch.setenv("SLIMNAS_ZOO", "/elsewhere")
    assert zoo_folder() == Path("/elsewhere")
    assert zoo_folder("given") == Path("given")


def test_unknown_name(zoo: Path) -> None:
    with pytest.raises(ZooError, match=r"'efficientformer_l2' \(did you mean 'efficientformer_l"):
        get("efficientformer_l2", zoo=zoo)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml: no such file"):
        get(tmp_path / "nothing.yaml")


def test_a_damaged_entry_does_not_hide_the_others(zoo: Path, run: Path) -> None:
    add(run, name="good", zoo=zoo)
    add(run, name="bad", zoo=zoo)
    (zoo / "bad" / "metrics.json").write_text("{")
    listing = list_entries(zoo)
    assert [entry.name for entry in listing.entries][-1] == "good"
    ((folder, reason),) = listing.damaged
    assert folder == zoo / "bad"
    assert "not valid JSON" in reason


def test_published_numbers() -> None:
    published = {"l1": (79.2, 1.6), "l3": (82.4, 3.0), "l7": (83.3, 7.0)}
    for name, (top1, latency_ms) in published.items():
        metrics = get(f"efficientformer_{name}").metrics
        assert metrics["imagenet_top1"].value == top1
        assert metrics["iphone12_latency_ms"].value == latency_ms


EFFICIENTFORMERS = ["efficientformer_l1", "efficientformer_l3", "efficientformer_l7"]


@pytest.mark.parametrize(
    ("pattern", "family", "names"),
    [
        ("efficientformer_*", None, EFFICIENTFORMERS),
        ("*", "efficientformer", EFFICIENTFORMERS),
        ("*_l1", "efficientformer", ["efficientformer_l1"]),
        ("nothing*", None, []),
    ],
)
def test_a_part_of_the_zoo(zoo: Path, pattern: str, family: str | None, names: list[str]) -> None:
    listing = list_entries(zoo, pattern=pattern, family=family)
    assert [entry.name for entry in listing.entries] == names


def test_an_unknown_family(zoo: Path, run: Path) -> None:
    add(run, name="mine_1", zoo=zoo)
    assert [e.name for e in list_entries(zoo, family="mine").entries] == ["mine_1"]
    with pytest.raises(ZooError, match=r"no family 'efficientvits' \(did you mean 'efficientvit'"):
        list_entries(zoo, family="efficientvits")


def test_published_speeds() -> None:
    fastest = speeds(get("efficientformer_l1").metrics)
    assert [(one.name, one.device, one.unit) for one in fastest] == [
        ("iphone12_latency_ms", "iphone12", "ms"),
        ("i9_10940x_latency_ms", "i9 10940x", "ms"),
        ("rtx3090_images_per_s", "rtx3090", "images/s"),
    ]
    # A V100 at fp16: the order that the paper's table has.
    names = [f"efficientvit_m{i}" for i in range(6)]
    on_v100 = [get(name).metrics["v100_images_per_s"].value for name in names]
    assert on_v100 == sorted(on_v100, reverse=True)
    assert on_v100[0] == 27644


def test_every_published_number_is_a_known_kind() -> None:
    """Names outside the convention would be in no list."""
    looked_at = 0
    for name in builtin_names():
        if get(name).weights is not None:  # ours, not published
            continue
        metrics = get(name).metrics
        known = {TOP1, "imagenet_top1_of_weights", *(one.name for one in speeds(metrics))}
        assert set(metrics) <= known, name
        looked_at += len(metrics)
    assert looked_at > 60


# Metrics


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must map names to numbers, got a list"),
        ({"a": 3}, r"a\.value: must be a number, got None"),
        ({"a": {"value": "3", "provenance": "x"}}, r"a\.value: must be a number, got '3'"),
        ({"a": {"value": True, "provenance": "x"}}, r"a\.value: must be a number, got True"),
        ({"a": {"value": float("nan"), "provenance": "x"}}, r"a\.value: must be finite"),
        ({"a": {"value": 3}}, r"a\.provenance: must say where the number comes from"),
    ],
)
def test_bad_metrics(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ZooError, match=message):
        load_metrics(path)


def test_metrics_round_trip(tmp_path: Path) -> None:
    save_metrics(tmp_path / "metrics.json", METRICS)
    assert load_metrics(tmp_path / "metrics.json") == METRICS


# Weights


def test_a_truncated_file(run: Path) -> None:
    path = run / "weights.safetensors"
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"weights\.safetensors: damaged") as caught:
            load_weights(path, TINY)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_something_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"not weights at all" * 9)
    with pytest.raises(WeightsError, match="weights") as caught:
        load_weights(path, TINY)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("executed",))

    torch.save({"model": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_weights(tmp_path / "weights.pth", TINY)


def test_whatever_bytes_in_a_pth_file_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    rng, seen = random.Random(0), 0
    given = [b"hello\nthis is text\n", b"", b"\x80\x02.", b"{}", b"name: x\n", b"PK\x03\x04"]
    given += [rng.randbytes(rng.randint(1, 60)) for _ in range(600)]
    for content in given:
        path.write_bytes(content)
        with pytest.raises(
            WeightsError, match=r"weights\.pth: (cannot be read|must hold)"
        ) as caught:
            load_weights(path, TINY)
        assert "\n" not in str(caught.value), content
        seen += 1
    assert seen == 606


def test_a_checkpoint_whose_names_are_numbers(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(1), 1: torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="must hold a dict of tensors"):
        load_weights(tmp_path / "w.pth", TINY)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file; expected weights"):
        load_weights(tmp_path / "w.safetensors", TINY)


def test_weights_of_another_architecture(run: Path) -> None:
    data = TINY.to_dict()
    data["stem"]["act"] = "gelu"  # the same tensors, another function
    other = Architecture.from_dict(data)
    with pytest.raises(WeightsError, match=r"saved for another architecture .*beside it"):
        load_weights(run / "weights.safetensors", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("stem.conv1.bias"), r"does not fit tiny: missing stem\.conv1\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "does not fit tiny: unknown extra"),
        (
            lambda s: s.update({"head.norm.bias": torch.zeros(7)}),
            r"head\.norm\.bias: tiny needs shape \(6,\), got \(7,\)",
        ),
        (
            lambda s: s["head.norm.bias"].fill_(float("nan")),
            r"head\.norm\.bias: holds values that are not finite",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    state = trained().state_dict()
    change(state)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(WeightsError, match=message):
        load_weights(path, TINY)
    with pytest.raises(WeightsError, match=message):
        save_weights(tmp_path / "again.safetensors", state, TINY)
    assert not (tmp_path / "again.safetensors").exists()


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = trained().state_dict()
    kept = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) == len(state) - 5
    safetensors.torch.save_file(kept, tmp_path / "w.safetensors")
    assert same_state(load_weights(tmp_path / "w.safetensors", TINY), state)


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_training_scripts(tmp_path: Path, wrapped: bool) -> None:
    state = trained().state_dict()
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "w.pth")
    assert same_state(load_weights(tmp_path / "w.pth", TINY), state)


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="must hold a dict of tensors, or one under 'model'"):
        load_weights(tmp_path / "w.pth", TINY)


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_weights(tmp_path / name, trained().state_dict(), TINY)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# create_model


def test_untrained(run: Path) -> None:
    network = create_model(run, seed=4)
    assert same_state(network.state_dict(), build(TINY, seed=4).state_dict())


def test_weights_by_path(run: Path, tmp_path: Path) -> None:
    TINY.save(tmp_path / "tiny.yaml")
    network = create_model(tmp_path / "tiny.yaml", pretrained=run / "weights.safetensors")
    assert same_state(network.state_dict(), trained().state_dict())


def test_other_classes_and_resolution(run: Path) -> None:
    network = create_model(run, pretrained=True, classes=3, resolution=(32, 64), seed=2)
    state, source = network.state_dict(), trained().state_dict()
    fresh = build(network.architecture, seed=2).state_dict()
    different = {name for name in state if not torch.equal(state[name], fresh[name])}
    assert state["head.head.weight"].shape == (3, 6)
    assert not {name for name in different if "head.head" in name}
    bias = "stages.1.blocks.0.token_mixer.attention_biases"
    assert state[bias].shape == (2, 4 * 8)
    kept = [name for name in state if name != bias and "head.head" not in name]
    assert len(kept) == len(source) - 5
    assert all(torch.equal(state[name], source[name]) for name in kept)
    assert network.eval()(torch.zeros(1, 3, 32, 64)).shape == (1, 3)


def test_no_weights_beside_a_file(tmp_path: Path) -> None:
    TINY.save(tmp_path / "tiny.yaml")
    with pytest.raises(WeightsError, match="tiny: no weights beside the architecture"):
        create_model(tmp_path / "tiny.yaml", pretrained=True)


def test_published_weights_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(repository: str, file: str) -> str:
        asked.append((repository, file))
        raise LocalEntryNotFoundError("cannot find it\nand more")

    monkeypatch.setattr("slimnas.zoo.hub.hub_in_reach", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsError, match=r"cannot download .*\(cannot find it\)") as caught:
        create_model("efficientformer_l1", pretrained=True)
    assert "\n" not in str(caught.value)
    assert asked == [("timm/efficientformer_l1.snap_dist_in1k", "model.safetensors")]


def test_published_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    state = timm.create_model("efficientformer_l1").state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr("slimnas.zoo.hub.hub_in_reach", lambda: True)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, file: str(tmp_path / file)
    )
    network = create_model("efficientformer_l1", pretrained=True)
    assert torch.equal(network.head.head_dist.weight, state["head_dist.weight"])


def test_features_only_gives_the_networks_own_maps(tmp_path: Path) -> None:
    network = create_model("efficientformer_l1", classes=3, resolution=64, seed=4).eval()
    network.architecture.save(tmp_path / "small.yaml")
    save_weights(tmp_path / "small.safetensors", network.state_dict(), network.architecture)
    backbone = create_model(
        tmp_path / "small.yaml", features_only=True, pretrained=tmp_path / "small.safetensors"
    ).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps, own = backbone(images), network.forward_features(images)
    assert [tuple(x.shape) for x in maps] == [
        (1, 48, 16, 16),
        (1, 96, 8, 8),
        (1, 224, 4, 4),
        (1, 448, 2, 2),
    ]
    assert all(torch.equal(a, b) for a, b in zip(maps, own, strict=True))
    assert not any(name.startswith("head") for name, _ in backbone.named_parameters())
