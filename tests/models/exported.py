"""Tiny models as IR, exported by optimum-intel: random weights, and transformers' word.

    python -m tests.models.exported FOLDER [FAMILY…]

FOLDER/FAMILY-ir is an export, FOLDER/FAMILY.npz a prompt and the logarithms of transformers' probabilities. Run by
tests in an environment of its own, since optimum-intel wants its own version of transformers.
"""

import sys
from pathlib import Path

from tests.models import judged
from tests.models.judged import WINDOW, model_of, save

_AS_GGUF = ("llama", "qwen2", "qwen3", "qwen3-moe", "phi", "gemma3", "gpt-oss", "smollm3", "granite")
FAMILIES = {name: judged.FAMILIES[name] for name in _AS_GGUF} | {"mistral": ("Mistral", {"sliding_window": WINDOW})}
"""As those of `judged`; here Mistral has a window, which files of GGUF don't say."""


def main() -> None:
    """Make the families that are named, or all."""
    from optimum.exporters.openvino import main_export

    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or FAMILIES:
        save(model_of(*FAMILIES[name]), folder / name, folder / f"{name}.npz")
        main_export(
            str(folder / name), folder / f"{name}-ir", task="text-generation-with-past", convert_tokenizer=False
        )


if __name__ == "__main__":
    main()
