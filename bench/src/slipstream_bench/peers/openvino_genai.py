"""OpenVINO GenAI: a library, so it is measured behind an app that does as little as possible, `genai_app.py`."""

import re
import tempfile
from pathlib import Path

from slipstream.models import Progress
from slipstream_bench.peers.base import Configuration, Prescribe
from slipstream_bench.peers.export import fetch_gguf, weights_folder
from slipstream_bench.peers.process import run_to_end
from slipstream_bench.peers.python_package import PackagedServer

_APP = Path(__file__).with_name("genai_app.py")
_CONVERT = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
_SWITCHES = {"default": (), "best": ("--prompt-lookup", "--compact")}
_NOTES = (
    "A minimal app around ContinuousBatchingPipeline serves this library and adds little time.",
    "It reads the GGUF that Slipstream's weights come from; its reader rounds zeros of 4-bit weights. The "
    "runtime is the same. OpenVINO configures its KV cache.",
    "It does not report cached prompt tokens.",
    "It serves `response_format`, not `tools`.",
)
_WHITE_SPACE = "its grammar for a JSON schema leaves white space to the model"
_COMPACT = (
    "Its JSON Schema grammar leaves white space to the model. If the schema is simple enough, the app passes a "
    "regular expression without any."
)


class OpenVINOGenAI(PackagedServer):
    """`ContinuousBatchingPipeline` with prefix caching, and with prompt lookup in its best configuration."""

    name = "openvino-genai"
    requirements = ("openvino-genai==2026.4.1.0", "fastapi==0.136.3", "uvicorn[standard]==0.54.0")
    configurations = (
        Configuration(
            "default",
            "ContinuousBatchingPipeline(FOLDER, SchedulerConfig(enable_prefix_caching=True, max_num_batched_tokens="
            "2**31 - 1), 'CPU'), which is what LLMPipeline(FOLDER, 'CPU') makes",
            (*_NOTES, _WHITE_SPACE),
        ),
        Configuration(
            "best",
            "the same and SchedulerConfig(cache_size=2), prompt_lookup=True; GenerationConfig(num_assistant_tokens=8, "
            "max_ngram_size=3, structured_output_config=StructuredOutputConfig(regex=COMPACT_JSON))",
            (*_NOTES, _COMPACT),
        ),
    )

    @property
    def prescribe(self) -> Prescribe:
        """A regular expression of the answer's characters; which tokens spell them is the model's choice."""
        return lambda body, answer: {**body, "response_format": {"type": "regex", "regex": re.escape(answer)}}

    @property
    def weights(self) -> Path:
        """The folder that it reads: one of its own, or that of an OpenVINO export, which has a tokenizer for it."""
        exported = (self.model.path / "openvino_tokenizer.xml").exists()
        return self.model.path if exported else weights_folder(self.model) / "genai"

    def has_weights(self) -> bool:
        """Whether that folder is there."""
        return self.weights.exists()

    def fetch_weights(self, progress: Progress) -> None:
        """Fetch the GGUF and let GenAI convert it; raises `PeerError`."""
        if self.has_weights():
            return
        gguf = fetch_gguf(self.model, progress)
        with tempfile.TemporaryDirectory(dir=self.weights.parent) as workdir, progress.stage("Converting for GenAI"):
            folder = Path(workdir) / "genai"
            folder.mkdir()
            (folder / gguf.name).symlink_to(gguf)  # it writes beside the file
            run_to_end(
                [str(self.environment.python), "-c", _CONVERT, str(folder / gguf.name)], "GenAI can't convert it"
            )
            (folder / gguf.name).unlink()
            folder.rename(self.weights)

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        # -P, or `import openvino_genai` would find this file, which lies beside the app.
        python = [str(self.environment.python), "-P", str(_APP)]
        served = ["--model", str(self.weights), "--store", str(self.model.path), "--name", self.model.name]
        return [*python, *served, "--port", str(port), *_SWITCHES[configuration.name]]
