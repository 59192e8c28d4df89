"""Frequencies in feature maps: what Hi-Fi and Lo-Fi heads of HiLo attention pass, or any two parts.

Pan et al., "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022, Fig. 5) show the log
magnitudes of a few channels. Their script (github.com/ziplab/LITv2 issue 3) also shifts the channel
axis, keeps the mean, which outshines everything, and scales each picture for itself. Here every
channel counts, each map's mean is taken off, an image's spectrum is given relative to its own mean
power, so that maps of any scale can be compared, and radial averages make numbers of pictures.

Frequencies are in units of the Nyquist frequency: 1 is the highest along an axis, corners of the
spectrum reach sqrt(2). Shapes: B images, C channels, H x W positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component, walk
from slimnas.errors import AnalysisError, suggest
from slimnas.nn.build import Network
from slimnas.nn.layout import to_map
from slimnas.nn.litv2 import HiLo

HIGH = 0.5
"""Frequencies above this are high ones."""
SMALLEST = 4
"""Positions along a side of a map below which a spectrum says nothing."""
FLOOR = 1e-12
"""Added to relative power before its logarithm."""
ROUNDING = 1e-13
"""Share of a map's energy below which what varies in it is rounding of single precision."""

Branch = Literal["", "hi", "lo"]
BRANCHES: Mapping[Branch, str] = MappingProxyType({"": "", "hi": "Hi-Fi", "lo": "Lo-Fi"})
"""What `:hi` and `:lo` behind the name of a HiLo attention ask for."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """What of a network has its spectrum taken: the output of a module, or a branch of it.

    Attributes:
        module: name of the module.
        branch: `hi` or `lo` of a HiLo attention, else ``.
    """

    module: str
    branch: Branch = ""

    @property
    def name(self) -> str:
        """As it is written: `stages.2.blocks.0.attn:hi`."""
        return f"{self.module}:{self.branch}" if self.branch else self.module

    @property
    def group(self) -> str:
        """What parts are compared by: the branch, else the part itself."""
        return BRANCHES[self.branch] or self.name


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one part.

    Attributes:
        part: of what.
        size: rows and columns of its map.
        channels: of its map.
        images: how many were looked at.
        frequencies: middles of the rings, in units of the Nyquist frequency.
        power: mean power in each ring over the mean power of all frequencies; 1 for white noise.
        mean_percent: share of the energy that lies in the mean of each map, before it is taken
            off; mean over the images.
        high_percent: share of the rest above half the Nyquist frequency, mean over the images;
            None where every map is constant.
        high_deviation: standard deviation of that share over the images.
        white_percent: what that share is for white noise.
        picture: (H, W) of log10 of relative power, frequency 0 in the middle, where it is None.
    """

    part: Part
    size: tuple[int, int]
    channels: int
    images: int
    frequencies: tuple[float, ...]
    power: tuple[float, ...]
    mean_percent: float
    high_percent: float | None
    high_deviation: float | None
    white_percent: float
    picture: tuple[tuple[float | None, ...], ...]


def branch_parts(network: Network) -> list[Part]:
    """Both branches of every HiLo attention that has two.

    Raises:
        AnalysisError: there is none.
    """
    parts = [
        Part(name, branch)
        for name, module in network.named_modules()
        if isinstance(module, HiLo) and module.hi_heads and module.lo_heads
        for branch in ("hi", "lo")
    ]
    if not parts:
        name = network.architecture.name
        raise AnalysisError(
            f"{name}: has no HiLo attention with two branches, which are compared by default; name "
            "what to compare instead with --part, such as --part stages.0.blocks.0"
        )
    return parts


def find_part(network: Network, text: str) -> Part:
    """The part that `text` names: a module, `:hi` or `:lo` behind that of a HiLo attention.

    Raises:
        AnalysisError: no such module, a list of modules, or a branch it does not have.
    """
    name, _, branch = text.partition(":")
    modules = dict(network.named_modules())
    module = modules.get(name)
    if not name or module is None or isinstance(module, nn.ModuleList):
        known = [part.name for part in walk(network.architecture)]
        raise AnalysisError(
            f"--part {text}: {network.architecture.name} has no module of that name"
            f"{suggest(name, known)}; such are {', '.join(known[:4])}, ..., {known[-1]}"
        )
    if branch not in BRANCHES:
        raise AnalysisError(f"--part {text}: behind the colon must be hi or lo, got {branch!r}")
    if branch and not (isinstance(module, HiLo) and module.hi_heads and module.lo_heads):
        raise AnalysisError(
            f"--part {text}: {name} is no HiLo attention with two branches; leave :{branch} out"
        )
    return Part(name, branch)  # type: ignore[arg-type]  # just checked


def spectra(
    network: Network,
    parts: Sequence[Part],
    batches: Iterable[Tensor],
    progress: Progress = lambda _: None,
) -> list[Spectrum]:
    """Take the spectra of `parts` on images.

    Args:
        network: runs in evaluation mode, where it lies.
        parts: of what; see `branch_parts` and `find_part`.
        batches: normalised images (B, c, H, W), on the network's device.
        progress: told how many images are done.

    Returns:
        One spectrum per part, in their order.

    Raises:
        AnalysisError: an output is no map, or a map below 4x4; no images.
    """
    sums = {part: _Sum(part) for part in parts}
    was_training = network.training
    network.eval()
    done = 0
    try:
        with torch.no_grad(), _outputs(network, sums):
            for batch in batches:
                network(batch)
                done += len(batch)
                progress(done)
    finally:
        network.train(was_training)
    if not done:
        raise AnalysisError("a spectrum needs at least one image, got none")
    return [sums[part].result() for part in parts]


def relative_power(x: Tensor) -> Tensor:
    """Power of every frequency over the mean power of the image's frequencies.

    Args:
        x: maps (B, C, H, W).

    Returns:
        (B, H, W), frequency 0 in the middle and with power 0, channels averaged; the others
        average 1. All 0 for constant maps.
    """
    x = x.double()
    rest = x - x.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.fft2(rest).abs().square().mean(dim=1)
    whole = x.square().sum(dim=(-2, -1)).mean(dim=1) * x.shape[-2:].numel()  # by Parseval
    power[:, 0, 0] = 0.0  # rounding leaves some
    power = torch.fft.fftshift(power, dim=(-2, -1))
    total = power.sum(dim=(-2, -1))
    constant = total <= ROUNDING * whole
    mean = (total / (power.shape[-2:].numel() - 1)).masked_fill(constant, torch.inf)
    relative: Tensor = power / mean[:, None, None]
    return relative


def mean_share(x: Tensor) -> Tensor:
    """Share of the energy of maps (B, C, H, W) that lies in their means, (B,); 0 of silence."""
    x = x.double()
    means = x.mean(dim=(-2, -1)).square().sum(dim=1) * x.shape[-2:].numel()
    return means / x.square().sum(dim=(1, 2, 3)).clamp_min(torch.finfo(x.dtype).tiny)


def radii(rows: int, columns: int) -> Tensor:
    """Frequency of every position of a shifted spectrum (rows, columns), Nyquist's being 1."""
    y, x = (2 * torch.fft.fftfreq(side, dtype=torch.float64) for side in (rows, columns))
    shifted: Tensor = torch.fft.fftshift((y[:, None].square() + x.square()).sqrt(), dim=(-2, -1))
    return shifted


def rings(rows: int, columns: int) -> Tensor:
    """Number of the ring of every frequency: its radius in whole cycles per shorter side."""
    return (radii(rows, columns) * min(rows, columns) / 2).round().long()


class _Sum:
    """Adds up the spectra of one part's maps."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.channels = self.images = 0
        self.power = self.logs = torch.zeros(0, dtype=torch.float64)
        self.high: list[Tensor] = []
        self.means = 0.0

    def add(self, x: Tensor) -> None:
        """Add maps (B, C, H, W)."""
        power = relative_power(x).cpu()
        rows, columns = power.shape[-2:]
        if not self.images:
            self.channels = x.shape[1]
            self.power = torch.zeros(rows, columns, dtype=torch.float64)
            self.logs = torch.zeros_like(self.power)
        self.power += power.sum(dim=0)
        self.logs += (power + FLOOR).log10().sum(dim=0)
        above = radii(rows, columns) > HIGH
        energy = power.sum(dim=(1, 2))
        self.high.append(((power * above).sum(dim=(1, 2)) / energy)[energy > 0])
        self.means += float(mean_share(x).sum())
        self.images += len(x)

    def result(self) -> Spectrum:
        """The spectrum.

        Raises:
            AnalysisError: the part was never run.
        """
        if not self.images:
            raise AnalysisError(
                f"--part {self.part.name}: is never run; choose a block of the walk"
            )
        shares = torch.cat(self.high)
        rows, columns = self.power.shape
        ring = rings(rows, columns)
        counts = torch.bincount(ring.flatten())
        sums = torch.bincount(ring.flatten(), weights=self.power.flatten())
        power = sums / counts.clamp_min(1) / self.images
        drawn = [n for n in range(1, len(counts)) if counts[n]]
        middle = (rows // 2, columns // 2)
        above = int((radii(rows, columns) > HIGH).sum())
        logs = (self.logs / self.images).tolist()
        return Spectrum(
            part=self.part,
            size=(rows, columns),
            channels=self.channels,
            images=self.images,
            frequencies=tuple(2 * n / min(rows, columns) for n in drawn),
            power=tuple(float(power[n]) for n in drawn),
            mean_percent=100 * self.means / self.images,
            high_percent=100 * float(shares.mean()) if len(shares) else None,
            high_deviation=100 * float(shares.std(correction=0)) if len(shares) else None,
            white_percent=100 * above / (rows * columns - 1),
            picture=tuple(
                tuple(None if (y, x) == middle else value for x, value in enumerate(row))
                for y, row in enumerate(logs)
            ),
        )


@contextlib.contextmanager
def _outputs(network: Network, sums: Mapping[Part, _Sum]) -> Iterator[None]:
    """Add the outputs of the parts whenever they run."""
    components = list(walk(network.architecture))
    with contextlib.ExitStack() as hooks:
        for part, total in sums.items():
            around = [p for p in components if f"{part.module}.".startswith(f"{p.name}.")]
            hook = _hook(part, total, around[0] if around else None)
            module = network.get_submodule(part.module)
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _hook(part: Part, total: _Sum, component: Component | None) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any, out: Any) -> None:
        total.add(_branch(part, module, _as_map(part, out, component)))

    return hook


def _as_map(part: Part, out: Any, component: Component | None) -> Tensor:
    """The output of a part as maps (B, C, H, W).

    Raises:
        AnalysisError: it is none, or too small.
    """
    x = out
    if isinstance(x, Tensor) and x.dim() == 3 and component is not None:
        for shape in (component.output, component.input):
            if x.shape[1] == shape.positions:
                x = to_map(
                    x, FeatureShape(x.shape[2], shape.height, shape.width, shape.extra_tokens)
                )
                break
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise AnalysisError(
            f"--part {part.name}: its output must be a map or its tokens to have a spectrum, got "
            f"{got}; choose a block or its attention"
        )
    if min(x.shape[2:]) < SMALLEST:
        raise AnalysisError(
            f"--part {part.name}: a map of {x.shape[2]}x{x.shape[3]} is too small for a spectrum, "
            f"which needs {SMALLEST}x{SMALLEST}; choose an earlier block, or a larger --resolution"
        )
    return x


def _branch(part: Part, module: nn.Module, x: Tensor) -> Tensor:
    """The channels of a branch: Hi-Fi heads come first."""
    if not part.branch:
        return x
    assert isinstance(module, HiLo)
    first = x.shape[1] * module.hi_heads // (module.hi_heads + module.lo_heads)
    return x[:, :first] if part.branch == "hi" else x[:, first:]
