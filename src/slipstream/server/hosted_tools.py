"""Tools that the servers they are made for run themselves, such as a search of the web: here they are left out."""

from collections.abc import Sequence

from slipstream.server.by_type import Unknown


class HostedTool(Unknown):
    """A tool that the server runs, elsewhere."""


def left_out(tools: Sequence[object] | None) -> tuple[str, ...]:
    """A warning for each of the tools that is hosted."""
    return tuple(
        f"tools[{index}] is of type {tool.type!r}, which is run by the server that it's made for: it was left out here"
        for index, tool in enumerate(tools or ())
        if isinstance(tool, HostedTool)
    )
