"""Networks of the zoo with the interface of timm's models.

timm's registry takes functions that make models, and finds their settings in the dict
`default_cfgs` of the module that they say they are from: this one.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import (
    FeatureInfo,
    PretrainedCfg,
    adapt_input_conv,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.errors import WeightsError, ZooError, suggest
from slimnas.nn.build import Backbone, FeatureNetwork, Network, Stage, build
from slimnas.nn.dynamic import DynamicFeatureNetwork, dynamic
from slimnas.nn.layers import initialised
from slimnas.nn.undecayed import is_undecayed
from slimnas.zoo.create import create_model, find_weights, published_weights
from slimnas.zoo.entry import Entry
from slimnas.zoo.hub import download

default_cfgs: dict[str, Any] = {}
"""Settings of every registered model by its name; timm reads them from here."""

HUB_FILE = "model.safetensors"
COLOURS = 3
NEUTRAL = ("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate")
"""Options that timm's scripts always give; these networks have none of it."""

TAKES = ("num_classes", "in_chans", "img_size", "features_only", "out_indices", "seed")


class ZooModel(nn.Module):
    """A network of the zoo as timm's users know their models.

    `forward_features` gives the last stage's map (B, C, H, W) or tokens (B, N, C) before the head's
    norm, and `forward_head` makes logits of it. A distilled network gives the mean of its two
    classifiers' logits, in training too, unless `set_distilled_training(True)` was called; then
    it gives the pair in training. Parameters have the names they have in slimnas.

    Attributes:
        num_classes: number of classes; 0 for none.
        num_features: channels of the last map.
        in_chans: channels of the image.
        feature_info: per stage `num_chs`, `reduction` and `module`.
        pretrained_cfg: timm's settings of the weights; `default_cfg` is the same.
    """

    def __init__(self, network: Network, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.stem, self.stages, self.head = network.stem, network.stages, network.head
        # Not registered: its modules are those above, under the names they should have.
        self.__dict__["network"] = network
        architecture = network.architecture
        self.num_classes = architecture.head.classes
        self.num_features = self.head_hidden_size = architecture.widths[-1]
        self.in_chans = architecture.input.channels
        self.distilled_training = False
        self.feature_info = _feature_dicts(network)
        self._classifiers = tuple(
            name for name, part in self.head.named_modules() if isinstance(part, nn.Linear)
        )
        names = tuple(f"head.{name}" for name in self._classifiers)
        self.pretrained_cfg = self.default_cfg = {
            **cfg,
            "classifier": names if len(names) > 1 else names[0],
            "first_conv": f"stem.{_first_conv(self.stem)}",
        }

    @property
    def architecture(self) -> Architecture:
        """What the network was built from; other classifiers since then are not in it."""
        return self._network.architecture

    @property
    def _network(self) -> Network:
        network: Network = self.__dict__["network"]
        return network

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, c, H, W) to the last stage's map or tokens."""
        return self._network.last_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map what `forward_features` gives to logits (B, K), or to what classifiers see (B, C)."""
        head = _without(self.head, self._heads()) if pre_logits else self.head
        out: Tensor | tuple[Tensor, Tensor] = head(x)
        if isinstance(out, tuple) and (pre_logits or not self.distilled_training):
            return (out[0] + out[1]) / 2
        return out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (B, c, H, W) to logits (B, K)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier; a pair of them if distilled."""
        heads = self._heads()
        return heads if len(heads) > 1 else heads[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Start anew with `num_classes` classes; 0 leaves the classifier out.

        Raises:
            ZooError: another pooling.
        """
        _refuse_pooling(global_pool)
        like = next(self.head.parameters(), None)
        for name in self._classifiers:
            made: nn.Module = nn.Identity()
            if num_classes:
                made = initialised(nn.Linear(self.num_features, num_classes))
                if like is not None:
                    made.to(device=like.device, dtype=like.dtype)
            self.head.set_submodule(name, made.train(self.training))
        self.num_classes = num_classes

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled network gives the pair of logits in training."""
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if is_undecayed(name)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of layers, for learning rates that fall with depth."""
        stage = r"^stages\.(\d+)"
        return {"stem": r"^stem", "blocks": stage if coarse else rf"{stage}\.(?:blocks\.(\d+))?"}

    def _heads(self) -> tuple[nn.Module, ...]:
        return tuple(self.head.get_submodule(name) for name in self._classifiers)


class ZooFeatures(nn.Module):
    """A backbone as timm's `features_only` gives it; takes images of any size its family takes.

    Attributes:
        feature_info: timm's `FeatureInfo`: `channels()`, `reduction()`, `module_name()`.
    """

    def __init__(
        self, network: DynamicFeatureNetwork, cfg: Mapping[str, Any], indices: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.network = network
        self.in_chans = network.architecture.input.channels
        self.out_indices = indices
        self.feature_info = FeatureInfo(_feature_dicts(network), indices)
        left_out = ("num_classes", "classifier", "global_pool")
        self.pretrained_cfg = self.default_cfg = {
            name: value for name, value in cfg.items() if name not in left_out
        }

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, c, H, W) to the maps of the wanted stages."""
        maps = self.network.forward_features(x)
        return [maps[index] for index in self.out_indices]


@dataclass(frozen=True)
class Wanted:
    """What a call of `timm.create_model` asks for.

    Attributes:
        num_classes: number of classes; the entry's if none, 0 for no classifier.
        in_chans: channels of the image; the entry's if none.
        img_size: side or (height, width) of the image; the entry's if none.
        features_only: whether maps are wanted instead of logits.
        out_indices: stages whose maps are wanted, or how many of the last; all if none.
        seed: of what is not loaded.
    """

    num_classes: int | None = None
    in_chans: int | None = None
    img_size: int | tuple[int, int] | None = None
    features_only: bool = False
    out_indices: int | Sequence[int] | None = None
    seed: int = 0

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any]) -> Wanted:
        """Check the options of a call.

        Raises:
            ZooError: one that these models do not have.
        """
        options = dict(given)
        for option in NEUTRAL:
            if options.pop(option, 0) not in (0, None):
                raise ZooError(f"{name}: {option} must be 0: slimnas's networks have no dropout")
        _refuse_pooling(options.pop("global_pool", None))
        if options.pop("cache_dir", None) is not None:
            raise ZooError(f"{name}: cache_dir is not looked at; set HF_HOME or HF_HUB_CACHE")
        for option in options:
            if option not in TAKES:
                raise ZooError(
                    f"{name}: no option {option!r}{suggest(option, TAKES)}; it takes: "
                    f"{', '.join(TAKES)}"
                )
        side = options.get("img_size")
        return cls(**{**options, "img_size": tuple(side) if isinstance(side, list) else side})

    def stages(self, count: int, name: str) -> tuple[int, ...]:
        """Indices of the wanted stages out of `count`.

        Raises:
            ZooError: one that is not there.
        """
        wanted = self.out_indices
        if wanted is None:
            return tuple(range(count))
        if isinstance(wanted, int):
            wanted = range(count - wanted, count)
        found = tuple(index + count if index < 0 else index for index in wanted)
        if not found or not all(0 <= index < count for index in found):
            raise ZooError(
                f"{name}: out_indices must be stages from 0 to {count - 1}, or how many of the "
                f"last, got {self.out_indices!r}"
            )
        return found


def register_entry(name: str, entry: Entry, zoo: Path) -> None:
    """Register one model with timm under `name`, in place of what had that name."""

    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        return make_model(name, entry, zoo, pretrained=pretrained, options=options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{entry.name} of slimnas's zoo."
    default_cfgs.update(generate_default_cfgs({name: settings(entry)}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Overwriting {name} ")
        register_model(make)


def make_model(
    name: str, entry: Entry, zoo: Path, *, pretrained: bool, options: Mapping[str, Any]
) -> ZooModel | ZooFeatures:
    """Make a model as `timm.create_model` asks for it.

    Raises:
        ZooError: an option that these models do not have.
        SpecError: an image size that the family cannot take.
        WeightsError: no weights, or not those of this model.
    """
    left = dict(options)
    source = {key: left.pop(key, None) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
    cfg = resolve_pretrained_cfg(name, **source).to_dict()
    wanted = Wanted.of(name, left)
    network = create_model(
        entry.name if entry.source == "built-in" else entry.folder or entry.name,
        pretrained=_weights(entry, cfg) if pretrained else False,
        classes=wanted.num_classes or None,
        resolution=wanted.img_size,
        zoo=zoo,
        seed=wanted.seed,
    )
    if wanted.in_chans not in (None, network.architecture.input.channels):
        network = _with_channels(network, wanted.in_chans or 0, pretrained, wanted.seed)
    image = network.architecture.input.shape
    cfg["input_size"] = (image.channels, image.height, image.width)
    if wanted.features_only:
        stages = [stage for stage in network.stages if isinstance(stage, Stage)]
        backbone = FeatureNetwork(network.architecture, stem=network.stem, stages=stages)
        return ZooFeatures(dynamic(backbone), cfg, wanted.stages(len(stages), name))
    model = ZooModel(network, cfg)
    if wanted.num_classes == 0:
        model.reset_classifier(0)
    return model


def settings(entry: Entry) -> PretrainedCfg:
    """timm's settings of a model: where its weights are and what images they take.

    Weights that timm publishes take images as timm says.
    """
    provenance, image = entry.architecture.provenance, entry.architecture.input.shape
    published = published_weights(entry) or {}
    repository = published.get("repository")
    given = provenance.get("preprocessing") or {}
    of_timm = str(repository).removeprefix("timm/")
    known = None
    if of_timm != repository and timm.is_model(of_timm):
        with contextlib.suppress(RuntimeError):  # a tag that this version of timm does not have
            known = timm.get_pretrained_cfg(of_timm)
    if known is None:
        known = PretrainedCfg(**{key: tuple(given[key]) for key in ("mean", "std") if key in given})
    return replace(
        known,
        url=None,
        file=None if entry.weights is None else str(entry.weights),
        hf_hub_id=repository,
        hf_hub_filename=published.get("file"),
        custom_load=False,
        input_size=(image.channels, image.height, image.width),
        fixed_input_size=True,
        num_classes=entry.architecture.head.classes,
        pool_size=None,
        classifier=None,
        first_conv=None,
    )


def _weights(entry: Entry, cfg: Mapping[str, Any]) -> Path:
    """The weights file: that of the settings where a caller changed them, else the entry's."""
    if cfg.get("file"):
        return Path(cfg["file"])
    repository = cfg.get("hf_hub_id")
    if repository and repository != (published_weights(entry) or {}).get("repository"):
        return download(repository, cfg.get("hf_hub_filename") or HUB_FILE)
    return find_weights(entry)


def _with_channels(network: Network, channels: int, pretrained: bool, seed: int) -> Network:
    """The network for images of `channels` channels; trained weights are adapted as timm does."""
    architecture = network.architecture
    data = architecture.to_dict()
    data["input"] = {**data["input"], "channels": channels}
    made = build(Architecture.from_dict(data, source=architecture.name), seed=seed)
    state, name = network.state_dict(), f"stem.{_first_conv(network.stem)}.weight"
    if not pretrained:
        state[name] = made.state_dict()[name]
    elif architecture.input.channels == COLOURS:
        state[name] = adapt_input_conv(channels, state[name])
    else:
        raise ZooError(
            f"{architecture.name}: in_chans: only weights for {COLOURS} channels can be adapted, "
            f"these are for {architecture.input.channels}"
        )
    made.load_state_dict(state)
    return made


def _first_conv(stem: nn.Module) -> str:
    for name, part in stem.named_modules():
        if isinstance(part, nn.Conv2d):
            return str(name)
    raise WeightsError("this network begins with no convolution, so its channels cannot change")


def _feature_dicts(network: Backbone) -> list[dict[str, Any]]:
    return [
        {"num_chs": info.channels, "reduction": info.stride, "module": info.module}
        for info in network.feature_info
    ]


def _without(module: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """`module` with `parts` left out; all else is shared with it."""
    if any(module is part for part in parts):
        return nn.Identity()
    bare = copy.copy(module)
    bare.__dict__["_modules"] = {
        name: None if child is None else _without(child, parts)
        for name, child in module._modules.items()
    }
    return bare


def _refuse_pooling(pooling: str | None) -> None:
    if pooling not in (None, "avg", "token", "fast"):
        raise ZooError(
            f"global_pool must be left out: the head pools as published; got {pooling!r}"
        )
