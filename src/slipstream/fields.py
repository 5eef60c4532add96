"""The fields that errors name, of a turn and of the configuration."""

from collections.abc import Mapping
from typing import Self


class Field(str):
    """A field of a turn: as a string its name in Python, by `path` the key to what each protocol calls it."""

    path: str
    place: int | str | None

    def __new__(cls, path: str, place: int | str | None = None) -> Self:
        """The field of a path, with the index or the key that `{}` in it stands for."""
        self = super().__new__(cls, path if place is None else path.format(place))
        self.path, self.place = path, place
        return self

    def at(self, place: int | str) -> "Field":
        """The field at this place of its path."""
        return Field(self.path, place)

    def named(self, names: Mapping[str, str]) -> str:
        """Its name in a table, or in Python if the table lacks it."""
        return names.get(self.path, self.path).format(self.place)


class Option(Field):
    """A field of the configuration."""


PROMPT = Field("prompt")
MESSAGES = Field("messages")
TOOLS = Field("tools")
TOOL_NAME = Field("tools[{}].name")
TOOL_PARAMETERS = Field("tools[{}].parameters")
TOOL_TEXT = Field("tools[{}].text")
TOOL_MODE = Field("mode")
ALLOWED_TOOLS = Field("allowed")
RESPONSE_SCHEMA = Field("response_schema")
TEMPLATE_KWARGS = Field("template_kwargs")
TEMPLATE_KWARG = Field("template_kwargs.{}")
TOOL_CALL_NAME = Field("tool_calls[{}].name")
TOOL_CALL_ARGUMENTS = Field("tool_calls[{}].arguments")
SESSION_ID = Field("session_id")
KEEP = Field("keep")
PINNED = Field("pinned")
CHOICES = Field("choices")
LOGIT_BIAS = Field("logit_bias")
MAX_TOKENS = Field("max_tokens")
KV_MEMORY = Option("kv_memory")
DEVICE = Option("device")
STATE_DIR = Option("state_dir")
MAX_PINS = Option("max_pins")
MAX_SESSION_MEMORY = Option("max_session_memory")
SANDBOX_SECONDS = Option("sandbox_seconds")
SANDBOX_MEMORY = Option("sandbox_memory")
