"""`slimnas analyze attention`: speed and memory of attention mechanisms as single layers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimnas.cli.analyze_memory import Attention, Runtime
from slimnas.cli.analyze_network import Device, DeviceOption, SeedOption
from slimnas.cli.latency_options import Clock, progress_bar
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import no_empty_folder, require_writable

if TYPE_CHECKING:
    from slimnas.analysis.attention_study import LayerRow, StudyResult

OUTPUT = Path("runs/analyze-attention")
VERDICTS = {
    "holds": "holds",
    "smaller": "does not hold: HiLo is faster, by less",
    "no difference": "does not hold: no difference",
    "reversed": "does not hold: HiLo is slower",
}


class Layout(str, Enum):
    """How maps go in and come out."""

    TOKENS = "tokens"
    OWN = "own"


def attention(
    resolutions: Annotated[
        str, typer.Option(metavar="SIDES", help="Sides of the map in tokens, such as 14,28,56.")
    ] = "14",
    batch: Annotated[int, typer.Option(min=1, help="Maps per call.")] = 64,
    dim: Annotated[int, typer.Option(min=1, help="Channels.")] = 768,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 12,
    mechanisms: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Such as hilo,sra,window,lka.", show_default="all"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    device: DeviceOption = Device.CPU,
    runtime: Annotated[
        Runtime, typer.Option(help="Inference runtime; memory is measured with torch.")
    ] = Runtime.TORCH,
    attention_form: Annotated[
        Attention | None,
        typer.Option(
            "--attention",
            help="torch: fused kernels, or explicit products and softmax.",
            show_default="fused",
        ),
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Tokens in and out for all, or each mechanism's own layout.")
    ] = Layout.TOKENS,
    clock: Annotated[
        Clock, typer.Option(help="cpu: for one thread on a machine that is never idle.")
    ] = Clock.WALL,
    rounds: Annotated[int, typer.Option(min=2, help="Timings of every layer.")] = 12,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")
    ] = True,
    seed: SeedOption = 0,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
    as_json: JsonOption = False,
) -> None:
    """Time attention mechanisms as single layers, beside HiLo's published lead over them.

    The defaults are the published layer: 14x14 tokens, 768 channels, 12 heads, 64 images. Files of
    an earlier run in the same folder are replaced.

    Example: slimnas analyze attention --mechanisms hilo,mhsa,window,sra,lka --batch 8
    """
    from slimnas.analysis.attention import run_study
    from slimnas.analysis.attention_study import AttentionStudy
    from slimnas.analysis.interleaved import Rounds
    from slimnas.analysis.mechanisms import MECHANISMS
    from slimnas.report.analysis_attention_files import save_study, study_dict

    if runtime is not Runtime.TORCH and attention_form is not None:
        raise typer.BadParameter("exported layers have one form of attention; leave it out")
    study = AttentionStudy(
        resolutions=_sides(resolutions),
        width=dim,
        heads=heads,
        batch=batch,
        mechanisms=tuple(MECHANISMS) if mechanisms is None else _words(mechanisms),
        runtime=runtime.value,
        device=device.value,
        threads=threads,
        fused=attention_form is not Attention.EXPLICIT,
        layout=layout.value,
        clock=clock.value,
        memory=memory,
        how=Rounds(rounds=rounds),
        seed=seed,
    )
    with no_empty_folder(output):
        require_writable(output)
        with progress_bar("attention") as progress:
            result = run_study(study, progress=progress)
        files = [*save_study(result, output), *_figures(result, output)]
    for one in result.left_out:
        note(f"left out: {one.mechanism} on {one.side}x{one.side}: {one.reason}")
    if as_json:
        print_json({**study_dict(result), "files": [shown_path(path) for path in files]})
        return
    for line in _lines(result):
        typer.echo(line)
    typer.echo("")
    for path in files:
        typer.echo(shown_path(path))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _sides(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(
            f"must be sides in tokens with commas between, such as 14,28; got {text!r}",
            param_hint="'--resolutions'",
        )
    return tuple(int(word) for word in words)


def _figures(result: StudyResult, folder: Path) -> list[Path]:
    from slimnas.report.analysis_attention import attention_figure, resolutions_figure
    from slimnas.report.figures import save_figure

    sides = list(dict.fromkeys(row.side for row in result.rows))
    paths: list[Path] = []
    for side in sides:
        name = "attention" if len(sides) == 1 else f"attention_{side}"
        paths += save_figure(attention_figure(result, side), folder / name)
    if len(sides) > 1:
        paths += save_figure(resolutions_figure(result), folder / "attention_resolutions")
    return paths


def _lines(result: StudyResult) -> Iterator[str]:
    from slimnas.report.analysis_attention_files import attention_kernels

    study = result.study
    name, version = result.runtime
    where = f"{study.threads} thread(s) of {result.machine.cpu}"
    yield (
        f"{name} {version} on {where if study.device == 'cpu' else result.compute_unit}, fp32, "
        f"attention {attention_kernels(result)}, {study.width} channels, {study.heads} heads, "
        f"batch {study.batch}"
    )
    yield study.how.describe()
    for side in dict.fromkeys(row.side for row in result.rows):
        yield ""
        yield f"{side}x{side} tokens"
        yield (
            f"{'mechanism':<20}  {'params':>9}  {'MMACs':>7}  {'images/s':>9}  {'ms':>9}  "
            f"{'IQR %':>5}  {'n':>3}  {'test MiB':>8}  {'train MiB':>9}  {'HiLo / it':>17}"
        )
        mine = [row for row in result.rows if row.side == side]
        for row in mine:
            yield _row_line(result, row)
        yield from _claims(result, mine)


def _row_line(result: StudyResult, row: LayerRow) -> str:
    first, third = row.quartiles_ms
    sizes = [
        "-" if size is None else f"{size / 2**20:.1f}" for size in (row.test_bytes, row.train_bytes)
    ]
    ratio = result.ratio(row)
    lead = (
        ""
        if ratio is None
        else f"{ratio.value:.2f} ({ratio.interval[0]:.2f}-{ratio.interval[1]:.2f})"
    )
    speed = result.images_per_s(row)
    return (
        f"{row.mechanism.title:<20}  {row.params:>9,}  {row.macs / 1e6:>7.2f}  {speed:>9.1f}  "
        f"{row.latency_ms:>9.3f}  {100 * (third - first) / row.latency_ms:>5.1f}  "
        f"{len(row.rounds_ms):>3}  {sizes[0]:>8}  {sizes[1]:>9}  {lead:>17}"
    ).rstrip()


def _claims(result: StudyResult, rows: list[LayerRow]) -> Iterator[str]:
    """The published ratios, one line each."""
    found = [(row, ratio) for row in rows if (ratio := result.ratio(row)) is not None]
    claims = [(row, ratio) for row, ratio in found if ratio.published is not None]
    if not claims:
        return
    yield ""
    yield "HiLo's published lead (NeurIPS 2022, Fig. 6; batch 64) and this one's 95 % interval"
    for row, ratio in claims:
        low, high = ratio.interval
        yield (
            f"{row.mechanism.title:<20}  published {ratio.published:>5.2f}  "
            f"here {ratio.value:>6.2f} "
            f"({low:.2f}-{high:.2f}), IQR {ratio.iqr:.2f}  {VERDICTS[ratio.verdict or 'holds']}"
        )
