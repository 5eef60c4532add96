"""OpenVINO GenAI: a library, so it is measured behind an app that does as little as possible, `genai_app.py`."""

from pathlib import Path

from slipstream_bench.peers.base import Configuration
from slipstream_bench.peers.python_package import PackagedServer

_APP = Path(__file__).with_name("genai_app.py")
_SWITCHES = {"default": (), "best": ("--prompt-lookup", "--compact")}
_NOTES = (
    "GenAI is a library without a server. A minimal app around ContinuousBatchingPipeline serves it and adds "
    "little time.",
    "It reads Slipstream's model folder: the same 4-bit weights, the same runtime. OpenVINO configures its KV cache.",
    "It does not report cached prompt tokens.",
    "It serves `response_format`, not `tools`.",
)
_WHITE_SPACE = "its grammar for a JSON schema leaves white space to the model"
_COMPACT = (
    "Its JSON Schema grammar leaves white space to the model, and no option forbids it. The app passes a regular "
    "expression without white space if the schema is simple enough."
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

    def command(self, configuration: Configuration, port: int) -> list[str]:
        """How its process is started."""
        # -P, or `import openvino_genai` would find this file, which lies beside the app.
        python = [str(self.environment.python), "-P", str(_APP)]
        served = ["--model", str(self.model.path), "--name", self.model.name, "--port", str(port)]
        return [*python, *served, *_SWITCHES[configuration.name]]
