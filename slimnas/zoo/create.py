"""`create_model`: a network by name or path, with or without trained weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast, overload

from slimnas.errors import WeightsError, ZooError
from slimnas.nn.build import FeatureNetwork, Network, Stage, build
from slimnas.nn.dynamic import DynamicFeatureNetwork
from slimnas.nn.resolution import adapt_state_dict
from slimnas.zoo.entry import Entry
from slimnas.zoo.hub import download
from slimnas.zoo.registry import get
from slimnas.zoo.weights import load_weights


@overload
def create_model(
    name_or_path: str | Path,
    *,
    features_only: Literal[False] = False,
    dynamic: Literal[False] = False,
    pretrained: bool | str | Path = False,
    classes: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    zoo: str | Path | None = None,
    seed: int = 0,
) -> Network: ...


@overload
def create_model(
    name_or_path: str | Path,
    *,
    features_only: Literal[True],
    dynamic: bool = False,
    pretrained: bool | str | Path = False,
    classes: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    zoo: str | Path | None = None,
    seed: int = 0,
) -> FeatureNetwork: ...


def create_model(
    name_or_path: str | Path,
    *,
    features_only: bool = False,
    dynamic: bool = False,
    pretrained: bool | str | Path = False,
    classes: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    zoo: str | Path | None = None,
    seed: int = 0,
) -> Network | FeatureNetwork:
    """Build a network from the zoo, an architecture file or a run folder.

    Args:
        name_or_path: what `slimnas.zoo.registry.get` finds.
        features_only: leave the head out; the network gives one map per stage, and says in
            `feature_info` how many channels, at which stride.
        dynamic: with `features_only`: let it take images of any size; see
            `slimnas.nn.dynamic.DynamicFeatureNetwork`.
        pretrained: True takes the entry's weights (for published models they are downloaded
            from the Hugging Face hub), a path those of a file in slimnas's, timm's, the
            official code's or (ViT, DeiT, Swin) Hugging Face transformers' format, False none.
        classes: number of classes if another one is wanted; classifiers start afresh then.
        resolution: input side in pixels, or (height, width), if another one is wanted;
            attention biases and position embeddings are interpolated then.
        zoo: the user's zoo; see `slimnas.zoo.registry.zoo_folder`.
        seed: seed of everything that is not loaded.

    Raises:
        ZooError: nothing of that name, or `dynamic` without `features_only`.
        SpecError: a resolution that the family cannot take.
        WeightsError: no weights, or not those of this architecture.
    """
    if dynamic and not features_only:
        raise ZooError(
            "dynamic=True needs features_only=True: backbones take any image size, a network with "
            "its head takes that of resolution="
        )
    entry = get(name_or_path, zoo=zoo)
    source = entry.architecture
    target = source if resolution is None else source.with_resolution(resolution)
    if classes is not None:
        target = target.with_head(classes=classes)
    network = build(target, seed=seed)
    if pretrained is not False:
        _load(network, entry, find_weights(entry) if pretrained is True else Path(pretrained))
    if not features_only:
        return network
    stages = cast("Iterable[Stage]", network.stages)
    kind = DynamicFeatureNetwork if dynamic else FeatureNetwork
    return kind(target, stem=network.stem, stages=stages)


def _load(network: Network, entry: Entry, path: Path) -> None:
    """Load the entry's weights into `network`, which may have other classes or another input."""
    source, target = entry.architecture, network.architecture
    state = load_weights(path, source)
    state = adapt_state_dict(
        state, source=source, target=source.with_resolution(target.input.resolution)
    )
    if target.head.classes != source.head.classes:
        fresh = network.state_dict()  # the classifiers are what has another shape
        state |= {name: fresh[name] for name in state if state[name].shape != fresh[name].shape}
    network.load_state_dict(state)


def find_weights(entry: Entry) -> Path:
    """The weights file of `entry`; those of a published model are downloaded and cached.

    Raises:
        WeightsError: it has none, or the download failed.
    """
    if entry.weights is not None:
        return entry.weights
    published = published_weights(entry)
    if published is None:
        told = entry.architecture.provenance.get("official_weights")
        elsewhere = f", and none on a hub ({told})" if told else ""
        raise WeightsError(
            f"{entry.name}: no weights beside the architecture{elsewhere}; give a weights file, or "
            "take it untrained"
        )
    return download(published["repository"], published["file"], sha256=published.get("sha256"))


def published_weights(entry: Entry) -> dict[str, str] | None:
    """Where on the hub the weights of a built-in entry are: repository, file, sha256 if known."""
    if entry.source != "built-in":
        return None
    weights: dict[str, str] | None = entry.architecture.provenance.get("weights")
    return weights
