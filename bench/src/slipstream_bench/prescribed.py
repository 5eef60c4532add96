"""Slipstream with a chooser that follows the coding workloads' script: `python -m slipstream_bench.prescribed serve …`.

It takes the flags of `slipstream`. Everything computes and costs what it does in service, but for the tokens chosen.
"""

from slipstream import runtime
from slipstream.backend import Backend
from slipstream.cli import main as slipstream
from slipstream.config import EngineConfig
from slipstream.models import Model
from slipstream.tokenizer import Tokenizer
from slipstream_bench.conversation import prescribed_answer
from slipstream_bench.scripted import Script, ScriptedBackend, opening_of


def main() -> None:
    """Run the command line with scripted backends."""
    for name, load in list(runtime.BACKENDS.items()):
        runtime.BACKENDS[name] = scripted(load, prescribed_answer)
    slipstream()


def scripted(load: runtime.Load, script: Script) -> runtime.Load:
    """The same backend, following a script."""

    def compiled(model: Model, config: EngineConfig) -> runtime.Measure:
        measure = load(model, config)

        def measured(progress: runtime.Progress) -> Backend:
            tokenizer = Tokenizer.from_file(model.tokenizer_path)
            opening = opening_of(runtime.chat_template(model, tokenizer), tokenizer)
            stop_token = min(model.manifest.stop_token_ids)
            return ScriptedBackend(measure(progress), script, tokenizer, opening, stop_token)

        return measured

    return compiled


if __name__ == "__main__":
    main()
