"""The command line: `slipstream serve`, `pull`, `chat`."""

from slipstream.cli.app import main

__all__ = ["main"]
