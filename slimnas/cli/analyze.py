"""`slimnas analyze`: what the parts of a network cost and hold; each command has its own file."""

from __future__ import annotations

import typer

from slimnas.cli.analyze_ablate import ablate
from slimnas.cli.analyze_attention import attention
from slimnas.cli.analyze_heads import heads
from slimnas.cli.analyze_memory import memory
from slimnas.cli.analyze_mhsa_share import mhsa_share
from slimnas.cli.analyze_ranking import ranking
from slimnas.cli.analyze_spectrum import spectrum

app = typer.Typer(
    no_args_is_help=True, help="Analyses: attention mechanisms, memory, what heads learn, rankings."
)
app.command()(attention)
app.command()(memory)
app.command()(mhsa_share)
app.command()(heads)
app.command()(spectrum)
app.command()(ablate)
app.command()(ranking)
