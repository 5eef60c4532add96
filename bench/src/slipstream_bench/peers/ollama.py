"""Ollama, where it is installed: it comes as a program of its own, not as a Python package."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from slipstream.models import Progress
from slipstream_bench.peers.base import Configuration, Endpoint, Peer, PeerError
from slipstream_bench.peers.export import fetch_gguf, gguf_path
from slipstream_bench.peers.process import free_port, run_to_end, server_process

_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "best": {"OLLAMA_NUM_PARALLEL": "8", "OLLAMA_CONTEXT_LENGTH": "8192", "OLLAMA_FLASH_ATTENTION": "1"},
}
_NOTES = (
    "reads the GGUF that Slipstream's weights come from, as it is, and takes the chat template from it as far as it "
    "knows it",
    "it has no n-gram speculation, and its grammar allows white space between the parts of JSON",
    "it doesn't say how many tokens of a prompt it had cached",
)


class Ollama(Peer):
    """`ollama serve`, with models of its own folder, so that those of the user are left alone."""

    name = "ollama"
    configurations = tuple(
        Configuration(name, " ".join((*(f"{key}={value}" for key, value in settings.items()), "ollama serve")), _NOTES)
        for name, settings in _SETTINGS.items()
    )

    def installed(self) -> bool:
        """Whether `ollama` is on the PATH and the GGUF is there."""
        return shutil.which("ollama") is not None and gguf_path(self.model).exists()

    def setup(self, progress: Progress) -> None:
        """Fetch the GGUF; raises `PeerError` if there is no `ollama`."""
        if shutil.which("ollama") is None:
            raise PeerError("there is no `ollama` on the PATH: install it as https://ollama.com/download says")
        fetch_gguf(self.model, progress)

    def settings(self, configuration: Configuration, port: int) -> dict[str, str]:
        """The environment variables, which are all the settings that it has."""
        place = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(self.folder / "models")}
        return {**place, "OLLAMA_KEEP_ALIVE": "-1", **_SETTINGS[configuration.name]}

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        """The server on a free port, with the model made known to it."""
        port = free_port()
        settings = self.settings(configuration, port)
        log = self.folder / f"{configuration.name}.log"
        with server_process(
            ["ollama", "serve"], f"http://127.0.0.1:{port}/api/version", log, environment=settings
        ) as group:
            self._create_model(settings)
            version = httpx.get(f"http://127.0.0.1:{port}/api/version").json()["version"]
            yield Endpoint(f"http://127.0.0.1:{port}/v1", self.model.name, group, version)

    def _create_model(self, settings: Mapping[str, str]) -> None:
        modelfile = self.folder / "Modelfile"
        modelfile.write_text(f"FROM {gguf_path(self.model).resolve()}\n")
        command = ["ollama", "create", self.model.name, "-f", str(modelfile)]
        run_to_end(command, "ollama can't read the model", settings)
