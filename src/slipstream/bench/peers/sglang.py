"""SGLang on the CPU, where somebody built it for one: there is no such build on the package index."""

from collections.abc import Iterator
from contextlib import contextmanager

from slipstream.bench.peers.base import Configuration, Endpoint, Peer, PeerError
from slipstream.bench.peers.environment import Environment
from slipstream.bench.peers.export import fetch_safetensors, safetensors_folder
from slipstream.bench.peers.process import free_port, server_process
from slipstream.models import Progress

_GUIDE = "https://docs.sglang.io/platforms/cpu_server.html"
_COMMON = ("--device", "cpu", "--disable-overlap-schedule", "--enable-cache-report")
_COMPACT = ("--constrained-json-disable-any-whitespace",)
_TORCH_NATIVE = ("--attention-backend", "torch_native", "--sampling-backend", "pytorch")
_FLAGS = {
    "default": _COMMON,
    "best-torch-native": (*_COMMON, *_COMPACT, *_TORCH_NATIVE),
    "best": (*_COMMON, *_COMPACT, "--speculative-algorithm", "NGRAM"),
}
_NOTES = (
    "SGLang is made for GPUs, and on CPUs for those with AMX: what it does elsewhere says nothing about SGLang on "
    "hardware that it is made for",
    "built from source, since the kernels in its wheels are for other hardware",
    "reads bf16: the same weights, dequantised from 4 bits and rounded to bf16",
    "the flags are those of its documentation; n-gram speculation on a CPU is new in it",
)


class SGLang(Peer):
    """SGLang's OpenAI server, with its own CPU kernels, or with torch's where those don't run."""

    name = "sglang"
    configurations = tuple(
        Configuration(name, f"python -m sglang.launch_server --model-path FOLDER {' '.join(flags)}", _NOTES)
        for name, flags in _FLAGS.items()
    )

    @property
    def environment(self) -> Environment:
        """Where a build of it is looked for."""
        return Environment(self.folder / "venv", "")

    def installed(self) -> bool:
        """Whether a build is there, and the weights in bf16."""
        return (self.environment.site_packages / "sglang").exists() and safetensors_folder(self.model).exists()

    def setup(self, progress: Progress) -> None:
        """Write the weights as it reads them; raises `PeerError` if nobody has built it yet."""
        fetch_safetensors(self.model, progress)
        if not self.installed():
            raise PeerError(
                "SGLang can't be installed for a CPU from the package index: the kernels in its wheels are for other "
                f"hardware. Build it as {_GUIDE} says, in the virtual environment {self.environment.folder}; then the "
                "bench finds it there"
            )

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        server = [str(self.environment.python), "-m", "sglang.launch_server"]
        served = ["--model-path", str(safetensors_folder(self.model)), "--served-model-name", self.model.name]
        return [*server, *served, "--host", "127.0.0.1", "--port", str(port), *_FLAGS[configuration.name]]

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        """The server on a free port."""
        port = free_port()
        with server_process(
            self.command(configuration, port),
            f"http://127.0.0.1:{port}/health",
            self.folder / f"{configuration.name}.log",
            environment={"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"},
            timeout=900,
        ) as group:
            version = self.environment.version("sglang")
            yield Endpoint(f"http://127.0.0.1:{port}/v1", self.model.name, group, version)
