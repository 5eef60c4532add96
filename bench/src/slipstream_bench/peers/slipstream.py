"""Slipstream itself, and what it is without each of its parts."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version

from slipstream_bench.peers.base import Configuration, Endpoint, Peer, bench_home
from slipstream_bench.peers.process import free_port, server_process

_SWITCHES = {
    "default": (),
    "no-reuse": ("--no-reuse",),
    "no-jump-forward": ("--no-jump-forward",),
    "no-speculation": ("--no-speculation",),
}
_NOTES = (
    "Forced tokens at the start of an answer are sent before the prompt is computed, so its time to the first token "
    "says little.",
)


class Slipstream(Peer):
    """The installed `slipstream serve`, in a process of its own."""

    name = "slipstream"
    configurations = tuple(
        Configuration(name, " ".join(("slipstream serve", *switches)), _NOTES) for name, switches in _SWITCHES.items()
    )

    def running(self, configuration: Configuration) -> AbstractContextManager[Endpoint]:
        """`slipstream serve` with the configuration's switches."""
        return serving(self.model.name, *_SWITCHES[configuration.name], log=configuration.name)


@contextmanager
def serving(model: str, *options: str, log: str) -> Iterator[Endpoint]:
    """`slipstream serve` on a free port, which logs to a file of the name `log`; raises `PeerError`."""
    port = free_port()
    command = [sys.executable, "-m", "slipstream", "serve", "--model", model, "--port", str(port), *options]
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
        )
