"""The `slipstream` command and its subcommands."""

from importlib.metadata import version
from typing import Annotated

import typer

from slipstream.cli.bench import ARGUMENTS_AS_THEY_ARE, bench
from slipstream.cli.chat import chat
from slipstream.cli.doctor import doctor
from slipstream.cli.make_key import make_key
from slipstream.cli.options import FromEnvironment
from slipstream.cli.pull import pull
from slipstream.cli.serve import serve
from slipstream.cli.sessions import sessions
from slipstream.cli.top import top

app = typer.Typer(
    name="slipstream",
    help="A stateful inference server for agents that call tools: a turn costs its new tokens, not its history.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command(cls=FromEnvironment)(serve)
app.command()(chat)
app.command()(pull)
app.command(add_help_option=False, context_settings=ARGUMENTS_AS_THEY_ARE)(bench)
app.command(cls=FromEnvironment)(sessions)
app.command(cls=FromEnvironment)(top)
app.command()(make_key)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slipstream {version('slipstream')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
