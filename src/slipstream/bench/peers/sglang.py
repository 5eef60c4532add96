"""SGLang on the CPU, with a stand-in for its kernels: the package index has none that are built for one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slipstream.bench.peers.base import Configuration, Endpoint, Peer
from slipstream.bench.peers.environment import Environment
from slipstream.bench.peers.export import fetch_safetensors, safetensors_folder
from slipstream.bench.peers.process import free_port, server_process
from slipstream.models import Progress

_REQUIREMENT = "sglang==0.5.23"
# What its wheel asks for is mostly for GPUs, and much of that has no build elsewhere. It imports these.
_TORCH = ("torch==2.14.1", "torchvision==0.29.1")
_NEEDED = (
    *("transformers==5.19.0", "tokenizers==0.23.2", "sentencepiece==0.2.1", "tiktoken", "gguf"),
    *("compressed-tensors==0.18.0", "xgrammar==0.2.7", "llguidance>=1.7.6,<2", "interegular", "jsonschema"),
    *("openai==2.8.0", "openai-harmony==0.0.4", "partial_json_parser", "pydantic", "msgspec", "orjson", "pybase64"),
    *("aiohttp", "fastapi", "uvicorn>=0.51", "uvloop", "python-multipart", "requests", "pyzmq", "prometheus-client"),
    *("dill", "einops", "ipython", "numpy", "pillow", "psutil", "py-spy", "regex", "scipy", "setproctitle"),
    *("soundfile==0.13.1", "tqdm", "watchfiles", "xxhash", "zstandard"),
)
_STAND_IN = Path(__file__).with_name("sgl_kernel_stand_in.py")

_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
_FLAGS = ("--device", "cpu", "--max-total-tokens", "65536", "--enable-cache-report")
_BEST_FLAGS = (
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule"),
    "--constrained-json-disable-any-whitespace",
)
_NOTES = (
    "SGLang is made for GPUs, and on CPUs for those with AMX and kernels built from source: what it does here says "
    "nothing about SGLang on hardware that it is made for",
    "its package's kernels are for other hardware, so attention is PyTorch's; n-gram speculation and compiled graphs "
    "don't start without those kernels",
    "reads bf16: the same weights, dequantised from 4 bits and rounded to bf16",
    "KV memory for 65,536 tokens, where it would take most of the machine's memory by itself",
)


def _as_typed(flags: Sequence[str]) -> str:
    """A command as a reader would type it."""
    settings = (f"{name}={value}" for name, value in _ENVIRONMENT.items())
    return " ".join((*settings, "python -m sglang.launch_server --model-path FOLDER", *flags))


class SGLang(Peer):
    """SGLang's OpenAI server with PyTorch's attention; compact JSON in its best configuration."""

    name = "sglang"
    configurations = (
        Configuration("default", _as_typed(_FLAGS), _NOTES),
        Configuration("best", _as_typed((*_FLAGS, *_BEST_FLAGS)), _NOTES),
    )

    @property
    def environment(self) -> Environment:
        """Where SGLang is installed."""
        return Environment(self.folder / "venv", _REQUIREMENT)

    def installed(self) -> bool:
        """Whether its environment and the weights in bf16 are there."""
        return self.environment.complete and safetensors_folder(self.model).exists()

    def setup(self, progress: Progress) -> None:
        """Install it, 6 GB with torch, and write the weights as it reads them."""
        environment = self.environment
        if not environment.complete:
            environment.create()
            environment.install(progress, *_TORCH)
            environment.install(progress, *_NEEDED)
            environment.install(progress, _REQUIREMENT, "--no-deps")
            (environment.site_packages / "sgl_kernel.py").write_text(_STAND_IN.read_text())
            environment.mark_complete()
        fetch_safetensors(self.model, progress)

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        server = [str(self.environment.python), "-m", "sglang.launch_server"]
        served = ["--model-path", str(safetensors_folder(self.model)), "--served-model-name", self.model.name]
        flags = (*_FLAGS, *_BEST_FLAGS) if configuration.name == "best" else _FLAGS
        return [*server, *served, "--host", "127.0.0.1", "--port", str(port), *flags]

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        """The server on a free port."""
        port = free_port()
        with server_process(
            self.command(configuration, port),
            f"http://127.0.0.1:{port}/health",
            self.folder / f"{configuration.name}.log",
            environment=_ENVIRONMENT,
            timeout=900,
        ) as group:
            version = self.environment.version("sglang")
            yield Endpoint(f"http://127.0.0.1:{port}/v1", self.model.name, group, version)
