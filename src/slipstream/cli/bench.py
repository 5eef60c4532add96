"""`slipstream bench`: the benchmark harness, where its package is installed."""

from importlib.metadata import entry_points

import typer

from slipstream.cli.options import readable_errors
from slipstream.errors import SlipstreamError

ARGUMENTS_AS_THEY_ARE = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


def bench(context: typer.Context) -> None:
    """Measure this server and others side by side, with the same requests, on this machine."""
    with readable_errors():
        command = next(iter(entry_points(group="slipstream.commands", name="bench")), None)
        if command is None:
            raise SlipstreamError("slipstream-bench is not installed: pip install ./bench, in a checkout of Slipstream")
    command.load()(context.args, prog_name=context.command_path)
