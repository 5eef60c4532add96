"""What an answer looks like in each family's format, as its models write it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from slipstream.chat.formats import FORMATS
from slipstream.chat.tags import Tags
from slipstream.tokenizer.provenance import Traced, content, joined, own

Call = tuple[str, dict[str, Any]]


def _json(value: object) -> Traced:
    return content(json.dumps(value, ensure_ascii=False))


def _raw(value: object) -> Traced:
    return content(value) if isinstance(value, str) else _json(value)


def _in_tags(calls: Sequence[Call], write: Callable[[str, dict[str, Any]], Traced]) -> list[Traced]:
    made = [own("<tool_call>\n") + write(*call) + own("\n</tool_call>") for call in calls]
    return [own("\n") + call if index else call for index, call in enumerate(made)]


def _object(name: str, arguments: dict[str, Any], key: str = "arguments") -> Traced:
    return _json({"name": name, key: arguments})


def _listed(calls: Sequence[Call], begin: str, end: str = "") -> list[Traced]:
    parts = [(own(", ") if index else own(f"{begin}[")) + _object(*call) for index, call in enumerate(calls)]
    parts[-1] += own(f"]{end}")
    return parts


def _qwen3_coder(name: str, arguments: dict[str, Any]) -> Traced:
    values = [own(f"<parameter={key}>\n") + _raw(value) + own("\n</parameter>\n") for key, value in arguments.items()]
    return own(f"<function={name}>\n") + joined("", values) + own("</function>")


def _minimax(name: str, arguments: dict[str, Any]) -> Traced:
    values = [
        own(f'<parameter name="{key}">') + _raw(value) + own("</parameter>\n") for key, value in arguments.items()
    ]
    return own(f'<invoke name="{name}">\n') + joined("", values) + own("</invoke>")


def _gemma(name: str, arguments: dict[str, Any]) -> Traced:
    def text(value: str) -> Traced:
        return own('<|"|>') + content(value) + own('<|"|>')

    def value(given: object) -> Traced:
        if isinstance(given, dict):
            pairs = [text(key) + content(":") + value(each) for key, each in given.items()]
            return content("{") + joined(",", pairs) + content("}")
        return text(given) if isinstance(given, str) else _json(given)

    pairs = [content(f"{key}:") + value(arguments[key]) for key in sorted(arguments)]
    return own(f"<|tool_call>call:{name}{{") + joined(",", pairs) + own("}<tool_call|>")


def _seed(name: str, arguments: dict[str, Any]) -> Traced:
    values = [own(f"<parameter={key}>") + _raw(value) + own("</parameter>\n") for key, value in arguments.items()]
    call = own(f"<function={name}>\n") + joined("", values) + own("</function>")
    return own("<seed:tool_call>\n") + call + own("\n</seed:tool_call>")


def _glm47(name: str, arguments: dict[str, Any]) -> Traced:
    pairs = [
        own(f"<arg_key>{key}</arg_key><arg_value>") + _raw(value) + own("</arg_value>")
        for key, value in arguments.items()
    ]
    return own(f"<tool_call>{name}") + joined("", pairs) + own("</tool_call>")


def _glm(name: str, arguments: dict[str, Any]) -> Traced:
    pairs = [
        own(f"<arg_key>{key}</arg_key>\n<arg_value>") + _raw(value) + own("</arg_value>\n")
        for key, value in arguments.items()
    ]
    return own(f"<tool_call>{name}\n") + joined("", pairs) + own("</tool_call>")


def _python(name: str, arguments: dict[str, Any]) -> Traced:
    words = {True: "True", False: "False"}
    values = [
        content(f"{key}=") + (content(words[value]) if isinstance(value, bool) else _json(value))
        for key, value in arguments.items()
    ]
    return content(f"{name}(") + joined(", ", values) + content(")")


def _sections(calls: Sequence[Call], opening: str, begin: str, named: str, end: str, close: str) -> list[Traced]:
    parts = [own(f"{begin}{begin and ''}{name}{named}") + _json(arguments) + own(end) for name, arguments in calls]
    parts[0] = own(opening) + parts[0]
    parts[-1] += own(close)
    return parts


def _kimi(calls: Sequence[Call]) -> list[Traced]:
    numbered = [(f"functions.{name}:{index}", arguments) for index, (name, arguments) in enumerate(calls)]
    return _sections(
        numbered,
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    )


_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)


def _deepseek_v3(calls: Sequence[Call]) -> list[Traced]:
    opening, begin, named, end, close = _DEEPSEEK
    return _sections(calls, opening, f"{begin}function{named}", "\n```json\n", f"\n```{end}", close)


def _harmony(calls: Sequence[Call]) -> list[Traced]:
    name, arguments = calls[0]
    head = own(f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>")
    return [head + _json(arguments)]


WRITERS: dict[str, Callable[[Sequence[Call]], list[Traced]]] = {
    "generic": lambda calls: _in_tags(calls, _object),
    "hermes": lambda calls: _in_tags(calls, _object),
    "qwen3-coder": lambda calls: _in_tags(calls, _qwen3_coder),
    "minimax-m2": lambda calls: [
        (own("\n") if index else own("<minimax:tool_call>\n"))
        + _minimax(*call)
        + own("\n</minimax:tool_call>" if index == len(calls) - 1 else "")
        for index, call in enumerate(calls)
    ],
    "glm-4": lambda calls: [(own("\n") if index else own("")) + _glm(*call) for index, call in enumerate(calls)],
    "glm-4.7": lambda calls: [(own("\n") if index else own("")) + _glm47(*call) for index, call in enumerate(calls)],
    "gemma-4": lambda calls: [_gemma(*call) for call in calls],
    "seed-oss": lambda calls: [(own("\n") if index else own("")) + _seed(*call) for index, call in enumerate(calls)],
    "mistral": lambda calls: _listed(calls, "[TOOL_CALLS]"),
    "granite3": lambda calls: _listed(calls, "<|tool_call|>"),
    "phi4-mini": lambda calls: _listed(calls, "<|tool_call|>", "<|/tool_call|>"),
    "mistral-v13": lambda calls: _sections(calls, "", "[TOOL_CALLS]", "[ARGS]", "", ""),
    "mistral-v11": lambda calls: _sections(calls, "", "[TOOL_CALLS]", "[CALL_ID]abcdefghi[ARGS]", "", ""),
    "deepseek-v3.1": lambda calls: _sections(calls, *_DEEPSEEK),
    "deepseek-v3": _deepseek_v3,
    "kimi-k2": _kimi,
    "lfm2": lambda calls: [
        own("<|tool_call_start|>[") + joined(", ", [_python(*call) for call in calls]) + own("]<|tool_call_end|>")
    ],
    "llama3": lambda calls: [_object(*calls[0], "parameters")],
    "harmony": _harmony,
}
"""The pieces of an answer that calls, one a call where calls end one by one."""

ONE_CALL = frozenset(("llama3", "harmony"))
"""Formats in which an answer has one call at most."""
CALL_ALONE = frozenset(("llama3",))
"""Formats in which an answer that calls has no text."""

TEMPLATES = {
    "generic": "{{ messages[0].content }}",
    "hermes": "…<tool_call>\n{{ tool_call | tojson }}\n</tool_call>",
    "qwen3-coder": "…<tool_call>\n<function={{ name }}>",
    "minimax-m2": "{% set begin = '<minimax:tool_call>' %}",
    "glm-4": "…<tool_call>{{ name }}\n<arg_key>{{ key }}</arg_key>\n<arg_value>",
    "glm-4.7": "…<tool_call>{{ name }}<arg_key>{{ key }}</arg_key><arg_value>",
    "gemma-4": "…<|tool_call>call:",
    "seed-oss": "…<seed:tool_call>\n<function=",
    "mistral": "…[TOOL_CALLS]{{ tool_calls }}",
    "granite3": "<|start_of_role|>…<|tool_call|>",
    "phi4-mini": "<|tool|>{{ message.tools }}<|/tool|>",
    "mistral-v13": "…[TOOL_CALLS]{{ name }}[ARGS]",
    "mistral-v11": "…[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜>…<｜tool▁sep｜>",
    "deepseek-v3": "<｜tool▁calls▁begin｜>…function<｜tool▁sep｜>…```json",
    "kimi-k2": "<|tool_calls_section_begin|>",
    "lfm2": "<|tool_list_start|>",
    "llama3": '<|start_header_id|> tools {"name": "f", "parameters": {}}',
    "harmony": "<|start|>…<|channel|>…<|call|>",
}

REASONING = {
    "<think></think>": ("<think>", "</think>"),
    "[THINK][/THINK]": ("[THINK]", "[/THINK]"),
    "<|channel>thought<channel|>": ("<|channel>thought", "<channel|>"),
}


def text_of(name: str, text: str) -> Traced:
    """An answer without a call, as a model of the format writes it."""
    return (own("<|channel|>final<|message|>") if name == "harmony" else own("")) + content(text)


def written(name: str, text: str, calls: Sequence[Call]) -> tuple[Traced, list[int]]:
    """An answer as a model of the format writes it, and where each of its calls ends."""
    if not calls:
        return text_of(name, text), []
    calls = calls[:1] if name in ONE_CALL else calls
    answer = content("" if name in CALL_ALONE else text)
    if name == "harmony" and text:
        answer = own("<|channel|>commentary<|message|>") + answer + own("<|end|><|start|>assistant")
    ends = []
    for piece in WRITERS[name](calls):
        answer += piece
        ends.append(len(answer))
    return answer, ends


def all_tags() -> list[str]:
    """The tags of all formats, and those of reasoning."""
    found: list[str] = []

    def remember(text: str) -> None:
        if text.startswith(("<", "[")) and text.endswith((">", "]")) and "\n" not in text:
            found.append(text)

    for family in FORMATS.values():
        family(Tags(remember))
    return [*dict.fromkeys(found), "<think>", "</think>", "[THINK]", "[/THINK]", "<|channel>", "<channel|>"]
