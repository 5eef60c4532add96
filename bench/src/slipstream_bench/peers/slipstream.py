"""Slipstream itself, and what it is without each of its parts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from slipstream.models import Progress
from slipstream_bench.peers.base import Configuration, Endpoint, Peer
from slipstream_bench.peers.process import free_port, server_process

_SWITCHES = {
    "default": (),
    "no-reuse": ("--no-reuse",),
    "no-jump-forward": ("--no-jump-forward",),
    "no-speculation": ("--no-speculation",),
}
_NOTES = (
    "what the grammar forces at the beginning of an answer is sent before the prompt is computed: its time to the "
    "first token says little",
)


class Slipstream(Peer):
    """The installed `slipstream serve`, in a process of its own."""

    name = "slipstream"
    configurations = tuple(
        Configuration(name, " ".join(("slipstream serve", *switches)), _NOTES) for name, switches in _SWITCHES.items()
    )

    def installed(self) -> bool:
        """True: the bench depends on it."""
        return True

    def setup(self, progress: Progress) -> None:
        """Nothing to do."""
        progress.say("slipstream needs no setting up: the bench is installed beside it")

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        """`slipstream serve` on a free port."""
        port = free_port()
        switches = _SWITCHES[configuration.name]
        command = [sys.executable, "-m", "slipstream", "serve", "--model", self.model.name, "--port", str(port)]
        log = self.folder / f"{configuration.name}.log"
        # What a user has set for their own server is not part of the configuration; empty is as good as not set.
        unset = {name: "" for name in os.environ if name.startswith("SLIPSTREAM_") and name != "SLIPSTREAM_HOME"}
        url = f"http://127.0.0.1:{port}"
        with server_process([*command, *switches], f"{url}/health", log, environment=unset) as group:
            yield Endpoint(
                base_url=f"{url}/v1",
                model=self.model.name,
                process_group=group,
                version=version("slipstream"),
                without_response_cache={"slipstream": {"response_cache": False}},
            )
