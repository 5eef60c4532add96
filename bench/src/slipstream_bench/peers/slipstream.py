"""Slipstream itself, and what it is without each of its parts."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

from slipstream_bench.peers.base import Configuration, Endpoint, Peer, bench_home
from slipstream_bench.peers.process import free_port, server_process

_SWITCHES = {
    "default": (),
    "no-reuse": ("--no-reuse",),
    "no-jump-forward": ("--no-jump-forward",),
    "no-speculation": ("--no-speculation",),
}
_NOTES = ("It sends forced tokens before it computes the prompt, so its time to the first token says little.",)
_PRESCRIBED = Configuration(
    "prescribed",
    "python -m slipstream_bench.prescribed serve",
    (
        *_NOTES,
        "Its model computes each step; then a script chooses the token. Drafts and forced tokens are as in service.",
    ),
)


class Slipstream(Peer):
    """The installed `slipstream serve`, in a process of its own."""

    name = "slipstream"
    configurations = (
        *(Configuration(name, " ".join(("slipstream serve", *flags)), _NOTES) for name, flags in _SWITCHES.items()),
        _PRESCRIBED,
    )

    def running(self, configuration: Configuration) -> AbstractContextManager[Endpoint]:
        """`slipstream serve` with the configuration's switches."""
        if configuration is _PRESCRIBED:
            return serving(self.model.name, log=configuration.name, module="slipstream_bench.prescribed")
        return serving(self.model.name, *_SWITCHES[configuration.name], log=configuration.name)


@contextmanager
def serving(model: str, *options: str, log: str, module: str = "slipstream") -> Iterator[Endpoint]:
    """`slipstream serve` on a free port, which logs to a file of the name `log`; raises `PeerError`.

    With another module, the command line that this one wraps.
    """
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--model", model, "--port", str(port), *options]
    # What a user has set for their own server is not part of what is measured; empty is as good as not set.
    unset = {name: "" for name in os.environ if name.startswith("SLIPSTREAM_") and name != "SLIPSTREAM_HOME"}
    url = f"http://127.0.0.1:{port}"
    log_path = bench_home() / "slipstream" / f"{log}.log"
    with server_process(command, f"{url}/health", log_path, environment=unset) as group:
        yield Endpoint(
            base_url=f"{url}/v1",
            model=model,
            process_group=group,
            version=version("slipstream"),
            without_response_cache={"slipstream": {"response_cache": False}},
            prescribed=None if module == "slipstream" else _as_it_is,
        )


def _as_it_is(body: Mapping[str, Any], _answer: str) -> dict[str, Any]:
    return dict(body)
