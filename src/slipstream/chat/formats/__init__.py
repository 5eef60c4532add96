"""Tool-call formats, one file a kind, one class a family."""

from slipstream.chat.formats.base import AnswerGrammar, ToolFormat
from slipstream.chat.formats.gemma import Gemma4
from slipstream.chat.formats.generic import Generic
from slipstream.chat.formats.harmony import Harmony
from slipstream.chat.formats.json_calls import Granite3, Hermes, Llama3, Mistral, Phi4Mini
from slipstream.chat.formats.named import DeepSeekV3, DeepSeekV31, KimiK2, Mistral11, Mistral13
from slipstream.chat.formats.parameters import GLM4, GLM47, MiniMaxM2, Qwen3Coder, SeedOSS
from slipstream.chat.formats.pythonic import LFM2
from slipstream.chat.tags import Tags
from slipstream.errors import ModelError

# The first that recognises a template is taken, so what is special comes before what is general.
_FAMILIES: tuple[type[ToolFormat], ...] = (
    *(Harmony, Gemma4, GLM47, GLM4, MiniMaxM2, SeedOSS, Qwen3Coder, KimiK2, DeepSeekV3, DeepSeekV31),
    *(Mistral11, Mistral13, Mistral, Phi4Mini, Granite3, LFM2, Hermes, Llama3, Generic),
)
FORMATS: dict[str, type[ToolFormat]] = {family.name: family for family in _FAMILIES}


def choose_format(template: str, tags: Tags, wanted: str | None = None) -> ToolFormat:
    """The format that a model's chat template shows, or the `wanted` one; generic where it shows none.

    `template` is its source, and what it makes of a call if that's known.

    Raises `ModelError` for a name that there is not.
    """
    if wanted is not None and wanted not in FORMATS:
        raise ModelError(f"there is no tool format {wanted!r}; there are {', '.join(FORMATS)}")
    shown = (name for name, known in FORMATS.items() if known.recognises(template))
    return FORMATS[wanted or next(shown, Generic.name)](tags)


__all__ = ["FORMATS", "AnswerGrammar", "ToolFormat", "choose_format"]
