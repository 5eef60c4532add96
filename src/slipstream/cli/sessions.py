"""`slipstream sessions`: what a running server remembers."""

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from slipstream.cli.remote import LOCAL, ApiKey, Url, server_at

if TYPE_CHECKING:
    import httpx

_PAGE = 100


def sessions(url: Url = LOCAL, api_key: ApiKey = "none") -> None:
    """List the sessions of a running server, the most recently used first.

    Examples:

      slipstream sessions

      slipstream sessions --url http://127.0.0.1:9000
    """
    with server_at(url, api_key) as http:
        listed = _all(http)
    table = Table("session", "messages", "tokens", "in memory", "on disk", "age", "unused for", "pinned", "fork of")
    for each in listed:
        table.add_row(
            each["id"],
            f"{each['message_count']:,}",
            f"{each['tokens']:,}",
            _size(each["kv_bytes"]),
            _size(each["saved_bytes"]),
            _age(each["created_at"]),
            _age(each["last_used_at"]),
            "yes" if each["pinned"] else "",
            each["parent"] or "",
        )
    Console().print(table if listed else "There are no sessions.")


def _all(http: "httpx.Client") -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = []
    more = True
    while more:
        after = {"after": listed[-1]["id"]} if listed else {}
        page = http.get("/v1/sessions", params={"limit": _PAGE, **after}).raise_for_status().json()
        listed += page["data"]
        more = page["has_more"]
    return listed


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count else ""


def _age(since: float) -> str:
    seconds = int(max(0.0, time.time() - since))
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"
