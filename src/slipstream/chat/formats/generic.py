"""For templates that know no tools: the system message begins with them, calls and results are in Hermes form."""

import json
from collections.abc import Sequence
from typing import Any

from slipstream.chat.formats.json_calls import Hermes
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.setting import ToolUse
from slipstream.tokenizer.provenance import Traced, content, joined, origin_of, own

_INSTRUCTIONS = """# Tools

You may call these functions. Each line is the JSON description of one:
<tools>
TOOLS
</tools>

To call one, answer with its name and arguments as JSON in tags, and nothing else:
<tool_call>
{"name": "the function", "arguments": {"the parameter": "its value"}}
</tool_call>"""


class Generic(Hermes):
    """Writes tools, calls and results as text, so that any template will do."""

    name = "generic"
    TOOLS_IN_MESSAGES = True

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """System, user and assistant messages of text alone; results of one turn's calls come as one user message."""
        result: list[dict[str, Any]] = []
        for message in messages:
            if message.role == "tool":
                text = own("<tool_response>\n") + content(message.text) + own("\n</tool_response>")
                if result and result[-1].get("results"):
                    result[-1]["content"] += own("\n") + text
                else:
                    result.append({"role": "user", "content": text, "results": True})
            else:
                calls = map(_call_text, message.tool_calls)
                text = joined("\n", (part for part in (content(message.text), *calls) if part))
                thoughts = dict.fromkeys(self.THOUGHTS, message.reasoning) if message.reasoning else {}
                result.append({"role": message.role, "content": text, **thoughts})
        if use.described:
            self._describe(result, use)
        return result

    @staticmethod
    def _describe(messages: list[dict[str, Any]], use: ToolUse) -> None:
        tools = "\n".join(json.dumps(tool.as_dict()["function"], ensure_ascii=False) for tool in use.described)
        instructions = own(_INSTRUCTIONS).replace("TOOLS", content(tools))
        # Clients change their system text, by the date or the state of a repository, and hardly ever their tools.
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] = instructions + own("\n\n") + messages[0]["content"]
        else:
            messages.insert(0, {"role": "system", "content": instructions})


def _call_text(call: ToolCall) -> Traced:
    body = json.dumps({"name": call.name, "arguments": call.parsed_arguments()}, ensure_ascii=False)
    return own(f"{Hermes.BEGIN}\n") + content(body, origin_of(call.arguments)) + own(f"\n{Hermes.END}")
