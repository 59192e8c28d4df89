"""Colours of the report, and figures as files and as inline SVG that follows the page's theme.

A figure is drawn once with the light palette. Inlined, each palette colour becomes a CSS
variable, so the same SVG reads well on a dark page; the files keep the light colours on white.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimnas._files import atomic_path
from slimnas.latency.table import DeviceInfo

WIDE_IN = 9.0
NARROW_IN = 4.0
"""Widths in inches of the two layouts: a desktop column and a phone."""

PNG_DPI = 160
HEAT_STEPS = 7

# name: (light, dark). Categorical hues after Okabe and Ito, told apart by colour-blind readers.
PALETTE = {
    "ink": ("#1b2530", "#e6ebf1"),
    "muted": ("#5a6673", "#9eabb8"),
    "grid": ("#e1e6eb", "#2c3641"),
    "edge": ("#aab4be", "#54616e"),
    "mb4d": ("#2673b8", "#5fa8e6"),
    "mb3d": ("#bd560c", "#f09a4a"),
    "width": ("#0b8467", "#3dc4a0"),
    "other": ("#657280", "#93a1ae"),
    "down": ("#a9bccd", "#52667a"),
    "target": ("#a3378d", "#df86cc"),
    "paper": ("#fefefe", "#171d24"),
    "ghost": ("#c3cbd3", "#4a5662"),
    "on_mb4d": ("#fffffe", "#0d1520"),
    "on_mb3d": ("#fffeff", "#1d1205"),
    "on_other": ("#fefffe", "#10171f"),
    "hilo": ("#7546b8", "#b594f0"),
    "cga": ("#94720a", "#d9b443"),
    "mhsa": ("#a83232", "#ef8d8d"),
    "window": ("#5a55c4", "#a09cf2"),
    "shifted_window": ("#433a9e", "#877fe6"),
    "sra": ("#3f7f3a", "#86c77f"),
    "linear_sra": ("#5f7d1b", "#b4d162"),
    "tmsa": ("#2b7f8f", "#6cc3d2"),
    "strided": ("#b34a6a", "#e993ac"),
    "lka": ("#46618c", "#93aedb"),
    "conv_ffn": ("#1f5f99", "#78b4e0"),
    "pool": ("#557fa8", "#9cc0e4"),
    "on_block": ("#fefeff", "#101620"),
}
HEAT = (
    ("#edf3f8", "#1d2935"),
    ("#d3e2ee", "#233a4e"),
    ("#b2cde2", "#2a4f6c"),
    ("#8ab3d3", "#35678c"),
    ("#427aa6", "#5591bc"),
    ("#2c6596", "#7fb1d6"),
    ("#174a7a", "#b4d6f0"),
)
"""Low to high, against the page: darker on light, lighter on dark."""

# The two inks of heat cells: steps up to 3 and above. Distinct from the colours above.
HEAT_INK = (("#1b2631", "#e6ebf2"), ("#fdfeff", "#0c1620"))


def ink(name: str) -> str:
    """The light-palette colour to draw with."""
    return PALETTE[name][0]


def heat(step: int) -> tuple[str, str]:
    """Fill and text colour of a heat cell, `step` from 0 to `HEAT_STEPS` - 1."""
    return HEAT[step][0], HEAT_INK[step > HEAT_STEPS // 2][0]


def _variables() -> dict[str, tuple[str, str]]:
    named = {f"--c-{name.replace('_', '-')}": pair for name, pair in PALETTE.items()}
    heats = {f"--c-heat-{i}": pair for i, pair in enumerate(HEAT)}
    inks = {f"--c-heat-ink-{i}": pair for i, pair in enumerate(HEAT_INK)}
    return {**named, **heats, **inks}


def css_variables(dark: bool) -> str:
    """CSS declarations of every palette colour for one theme."""
    return " ".join(f"{name}: {pair[dark]};" for name, pair in _variables().items())


def is_narrow(width_in: float) -> bool:
    """Whether a figure of this width is the phone's."""
    return width_in < (WIDE_IN + NARROW_IN) / 2


def latency_label(device: DeviceInfo) -> str:
    """The words for an axis of latencies."""
    return f"latency by the {device.name} table, ms ({device.kind})"


@contextmanager
def drawing_style() -> Iterator[None]:
    """Matplotlib settings to draw and to save under; the caller's are restored."""
    settings: dict[str, Any] = {
        "axes.edgecolor": ink("edge"),
        "axes.labelcolor": ink("muted"),
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same layout everywhere
        "font.size": 8.0,
        "grid.color": ink("grid"),
        "grid.linewidth": 0.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "slimnas",
        "text.color": ink("ink"),
        "text.parse_math": False,  # a $ in a device's name is a dollar sign
        "xtick.color": ink("edge"),
        "xtick.labelcolor": ink("muted"),
        "ytick.color": ink("edge"),
        "ytick.labelcolor": ink("muted"),
    }
    with style.context(["default", settings]):  # not the user's matplotlibrc
        yield


def canvas(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """A figure whose one axes covers it, in points, y growing downwards."""
    figure = Figure(figsize=(width_in, height_in))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width_in * 72), ylim=(height_in * 72, 0))
    axes.set_axis_off()
    return figure, axes


def svg_bytes(figure: Figure, *, transparent: bool = False) -> bytes:
    """The figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with drawing_style():
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=transparent)
    return _numbered(buffer.getvalue().decode("utf-8")).encode("utf-8")


def _numbered(svg: str) -> str:
    """Ids by number: matplotlib hashes them from places whose last bits a layout solver varies."""
    ids = dict.fromkeys(re.findall(r'\bid="(\w*[0-9a-f]{10})"', svg))
    names = {old: f"i{number}" for number, old in enumerate(ids)}
    return re.sub(r'((?:\bid=|href=)"#?|url\(#)(\w+)', lambda m: m[1] + names.get(m[2], m[2]), svg)


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an `<svg>` element for the page.

    Args:
        figure: what to show.
        key: unique on the page; ids are prefixed with it.
        label: what a screen reader says.
    """
    text = svg_bytes(figure, transparent=True).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    if view_box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    opening = (
        f'<svg {view_box.group()} role="img" aria-label="{html.escape(label, quote=True)}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    by_colour = {light: name for name, (light, _) in _variables().items()}
    return re.sub(
        r"(?<=: )#[0-9a-f]{6}",
        lambda m: f"var({by_colour[m.group()]})" if m.group() in by_colour else m.group(),
        text,
    )


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write `path` + `.svg` and `.png`, each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    svg, png = path.with_name(f"{path.name}.svg"), path.with_name(f"{path.name}.png")
    with atomic_path(svg) as temporary:
        temporary.write_bytes(svg_bytes(figure))
    save_png(figure, png)
    return svg, png


def save_png(figure: Figure, path: Path) -> None:
    """Write one PNG atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    with atomic_path(path) as temporary, drawing_style():
        figure.savefig(temporary, format="png", dpi=PNG_DPI, metadata={"Software": None})
