"""SGLang on the CPU, with a stand-in for its kernels: the package index has none that are built for one."""

from pathlib import Path

from slipstream.models import Progress
from slipstream_bench.peers.base import Configuration
from slipstream_bench.peers.environment import Environment
from slipstream_bench.peers.python_package import Launch, SafetensorsServer

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
_SERVER = ("sglang.launch_server", "--model-path")
_LAUNCHES = {
    "default": Launch(*_SERVER, _FLAGS, _ENVIRONMENT),
    "best": Launch(*_SERVER, (*_FLAGS, *_BEST_FLAGS), _ENVIRONMENT),
}
_NOTES = (
    "SGLang is built for GPUs, and for CPUs with AMX and kernels compiled from source. These times say nothing "
    "about it there.",
    "Its package has no kernels for this CPU. Attention is PyTorch's, and n-gram speculation and compiled graphs "
    "are unavailable.",
    "Weights are dequantised to bf16.",
    "KV memory is limited to 65,536 tokens; the default is most of the machine's.",
)


class SGLang(SafetensorsServer):
    """SGLang's OpenAI server with PyTorch's attention; compact JSON in its best configuration."""

    name = "sglang"
    requirements = ("sglang==0.5.23",)
    launches = _LAUNCHES
    configurations = tuple(Configuration(name, launch.as_typed(), _NOTES) for name, launch in _LAUNCHES.items())

    def install(self, environment: Environment, progress: Progress) -> None:
        """Install it, 6 GB with torch; raises `PeerError`."""
        environment.install(progress, *_TORCH)
        environment.install(progress, *_NEEDED)
        environment.install(progress, *self.requirements, "--no-deps")
        (environment.site_packages / "sgl_kernel.py").write_text(_STAND_IN.read_text())
