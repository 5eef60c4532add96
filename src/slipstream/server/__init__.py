"""The HTTP server: thin translations between protocols and turns."""

from slipstream.server.serve import run

__all__ = ["run"]
