"""The command line: one thin file per command group, heavy imports inside the commands."""

from slimnas.cli.main import main

__all__ = ["main"]
