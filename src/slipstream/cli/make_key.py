"""`slipstream make-key`: a new API key."""

from pathlib import Path
from typing import Annotated

import typer

from slipstream.cli.options import readable_errors


def make_key(
    file: Annotated[Path, typer.Argument(help="The file of `serve --api-keys-file`; it's made if it's missing.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is. Tenants share nothing; a tenant may have many keys.")],
    name: Annotated[str, typer.Option(help="What to know the key by in the file.")] = "",
    operator: Annotated[bool, typer.Option(help="Let it read /metrics too, which are about all tenants.")] = False,
) -> None:
    """Make an API key, add its digest to a file, and print it. Nothing else knows the key.

    A running server takes the change of the file within a second. Delete a key's lines to make it useless.

    Example:

      slipstream make-key keys.toml --tenant alice
    """
    from slipstream.server.keys import add_key  # the web framework takes a while to import

    with readable_errors():
        typer.echo(add_key(file, tenant, name=name, operator=operator))
