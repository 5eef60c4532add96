"""Tool-call formats, one file a family."""

from slipstream.chat.formats.base import ToolFormat
from slipstream.chat.formats.generic import Generic
from slipstream.chat.formats.hermes import Hermes
from slipstream.chat.formats.llama3 import Llama3
from slipstream.chat.formats.mistral import Mistral
from slipstream.chat.formats.qwen3_coder import Qwen3Coder
from slipstream.errors import ModelError

FORMATS: dict[str, ToolFormat] = {
    tool_format.name: tool_format for tool_format in (Qwen3Coder(), Hermes(), Mistral(), Llama3(), Generic())
}


def choose_format(template: str, wanted: str | None = None) -> ToolFormat:
    """The format that a model's chat template shows, or the `wanted` one; generic where it shows none.

    Raises `ModelError` for a name that there is not.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise ModelError(f"there is no tool format {wanted!r}; there are {', '.join(FORMATS)}")
        return FORMATS[wanted]
    return next((known for known in FORMATS.values() if known.recognises(template)), FORMATS["generic"])


__all__ = ["FORMATS", "ToolFormat", "choose_format"]
