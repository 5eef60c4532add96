"""The HTTP server: thin translations between protocols and turns."""

from slipstream.server.app import create_app
from slipstream.server.serve import run

__all__ = ["create_app", "run"]
