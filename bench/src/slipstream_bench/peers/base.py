"""What the bench needs of a server that it measures: to set it up, to run it, and to say what that is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from slipstream.errors import SlipstreamError
from slipstream.models import Model, Progress, home


class PeerError(SlipstreamError):
    """A peer can't be set up, does not start, or died; the message ends with what it said last."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to run a peer."""

    name: str
    """`default`, `best`, or what is switched off."""
    description: str
    """The exact flags and environment variables, as a reader would type them."""
    notes: tuple[str, ...] = ()
    """What a fair reader has to know: other weights, a path it wasn't made for, what could not be switched on."""


Prescribe = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""From a request's body and the text that it must be answered with to the body that brings this about."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A peer that runs and answers."""

    base_url: str
    """Up to and with `/v1`."""
    model: str
    """What a request has to call the model."""
    process_group: int | None
    """Of all its processes, which are paused while another peer is measured; None if they are not ours to pause."""
    version: str
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields that each request needs beside OpenAI's."""
    without_response_cache: Mapping[str, Any] = field(default_factory=dict)
    """Further fields that keep the server from answering exact repeats from memory, where it does."""
    api_key: str | None = None
    prescribed: Prescribe | None = None
    """None if the server can't be made to answer a given text."""


class Peer(ABC):
    """A server, and how it is run for a model of the store."""

    name: ClassVar[str]
    """As in `--server NAME` or `--server NAME:CONFIGURATION`."""
    configurations: ClassVar[tuple[Configuration, ...]]
    """The first is the one that a new user gets."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def folder(self) -> Path:
        """Where its virtual environment, and weights in its own format, are kept."""
        return bench_home() / self.name

    @property
    def compared_by(self) -> Configuration:
        """Its best configuration, or the only plain one."""
        return next((each for each in self.configurations if each.name == "best"), self.configurations[0])

    def installed(self) -> bool:
        """Whether `running` has what it needs."""
        return True

    def setup(self, progress: Progress) -> None:
        """Install what `running` needs; nothing to do if it's there. Raises `PeerError`."""
        progress.say(f"{self.name} needs no setting up")

    @abstractmethod
    def running(self, configuration: Configuration) -> AbstractContextManager[Endpoint]:
        """The server, ready to answer, until the context ends. Raises `PeerError`."""


def bench_home() -> Path:
    """The folder for all that the bench fetches or makes."""
    return home() / "bench"
