"""Model families: each one's vocabulary, and a small chat template in its form.

The templates are written for these tests: the same control tokens in the same places as the families' own, which are
longer, and none of their words. What is peculiar in how those treat messages is kept, where a prompt may depend on it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a tiny model of the family is made of, and what tests need to know of it."""

    name: str
    vocabulary: str
    width: int
    """Of the logits, which is more than the vocabulary's."""
    template: str
    eos: str
    bos: str | None = None
    call: str = ""
    """What an answer that calls begins with, if the model has few enough choices there for `logit_bias`."""
    thought: str = ""
    """What an answer that reasons begins with."""


_QWEN3 = """
{%- if tools %}
<|im_start|>system
{% if messages[0].role == 'system' %}
{{ messages[0].content }}

{% endif %}
Tools, one a line:
<tools>
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
</tools>
A call is JSON in tags:
<tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{% for message in messages %}
{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}
<|im_start|>assistant
{% set said = message.content.split('</think>')[-1].lstrip('\\n') %}
{{ said }}
{%- for call in message.tool_calls %}
{% if not loop.first or said %}

{% endif %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
<|im_end|>
{% elif message.role == 'tool' %}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}
<|im_start|>user
{%- endif %}

<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
<|im_end|>
{% endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

_LLAMA3 = """
{{- bos_token }}
{%- set head, end = '<|start_header_id|>', '<|end_header_id|>\\n\\n' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- head + 'system' + end }}
{%- if tools %}
{{- 'Environment: ipython\\n' }}
{%- endif %}
{%- if messages[0].role == 'system' %}
{{- messages[0].content | trim }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}
{{- raise_exception('This model makes one call at a time') }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- head + 'assistant' + end + '{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}
{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- head + 'ipython' + end + message.content + '<|eot_id|>' }}
{%- else %}
{{- head + message.role + end }}
{%- if loop.first and tools %}
{{- 'Functions, of which one may be called as {"name": ..., "parameters": ...}:\\n\\n' }}
{%- for tool in tools %}
{{- tool | tojson(indent=4) + '\\n\\n' }}
{%- endfor %}
{%- endif %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- head + 'assistant' + end }}
{%- endif %}
"""

_GPT_OSS = """
{{- '<|start|>system<|message|>Reasoning: medium\\n\\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- set system = messages[0].content if messages[0].role in ('system', 'developer') else '' %}
{%- if system or tools %}
{{- '<|start|>developer<|message|>' }}
{%- if system %}
{{- '# Instructions\\n\\n' + system + '\\n\\n' }}
{%- endif %}
{%- if tools %}
{{- '# Tools\\n\\nnamespace functions {\\n' }}
{%- for tool in tools %}
{{- 'type ' + tool.function.name + ' = (_: ' + (tool.function.parameters | tojson) + ') => any;\\n' }}
{%- endfor %}
{{- '}' }}
{%- endif %}
{{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{%- set last.name = call.name %}
{%- if message.content %}
{{- '<|start|>assistant<|channel|>commentary<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' + call.name + ' <|constrain|>json<|message|>' }}
{{- call.arguments | tojson }}
{{- '<|call|>' }}
{%- else %}
{%- set last.name = none %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- elif message.role == 'tool' %}
{%- if last.name is none %}
{{- raise_exception('No call goes before this result') }}
{%- endif %}
{{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- message.content | tojson }}
{{- '<|end|>' }}
{%- elif message.role == 'user' %}
{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant' }}
{%- endif %}
"""

_GEMMA3 = """
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Users and assistants take turns') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- first if loop.first else '' }}
{{- message.content | trim }}
{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

_DEEPSEEK = """
{%- set ns = namespace(system='', after_call=false, in_outputs=false) %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = ns.system + message.content %}
{%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for tool in tools or [] %}
{{- '\\n\\n' + tool.function.name + ': ' + (tool.function.parameters | tojson) }}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- set ns.in_outputs = false %}
{{- '<｜User｜>' + message.content + '<｜Assistant｜>OPENING' }}
{%- elif message.role == 'assistant' %}
{%- if message.content %}
{{- message.content }}
{%- endif %}
{%- for call in message.tool_calls %}
{{- '<｜tool▁calls▁begin｜>' if loop.first else 'BETWEEN' }}
{{- CALL }}
{{- '<｜tool▁calls▁end｜>' if loop.last else '' }}
{%- endfor %}
{{- '<｜end▁of▁sentence｜>' }}
{%- elif message.role == 'tool' %}
{{- OUTPUT }}
{%- endif %}
{%- endfor %}
"""

_DEEPSEEK_V3 = (
    _DEEPSEEK.replace("OPENING", "")
    .replace("BETWEEN", "\\n")
    .replace(
        "CALL",
        "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' "
        "+ call.function.arguments + '\\n```<｜tool▁call▁end｜>'",
    )
    .replace(
        "OUTPUT",
        "('' if ns.in_outputs else '<｜tool▁outputs▁begin｜>') + '<｜tool▁output▁begin｜>' + message.content "
        "+ '<｜tool▁output▁end｜>' }}\n{%- set ns.in_outputs = true %}\n"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}\n{%- set ns.in_outputs = false %}\n"
        "{{- '<｜tool▁outputs▁end｜>' }}\n{%- endif %}\n{{- ''",
    )
)

_DEEPSEEK_V31 = (
    _DEEPSEEK.replace("OPENING", "</think>")
    .replace("BETWEEN", "")
    .replace(
        "CALL",
        "'<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments "
        "+ '<｜tool▁call▁end｜>'",
    )
    .replace("OUTPUT", "'<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>'")
)

_MISTRAL = """
{{- bos_token }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- if messages[0].role == 'system' %}
{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- if tools %}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{%- for message in rest %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
{%- if (message.role == 'user') != (ns.turns % 2 == 0) %}
{{- raise_exception('Users and assistants take turns') }}
{%- endif %}
{%- set ns.turns = ns.turns + 1 %}
{%- endif %}
{%- if message.role == 'user' %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}
{{- message.content or '' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}
{{- raise_exception('Ids of calls have nine characters') }}
{%- endif %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}
{{- call.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}
"""

_DEEPSEEK_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "call": "<｜tool▁calls▁begin｜>",
}

FAMILIES = (
    Family("qwen3", "qwen3", 151_936, _QWEN3, eos="<|im_end|>", call="<tool_call>", thought="<think>"),
    Family("llama3.1", "llama3.1", 128_256, _LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>", call='{"'),
    Family(
        "gpt-oss",
        "gpt-oss",
        201_088,
        _GPT_OSS,
        eos="<|return|>",
        call="<|channel|>commentary to=functions.",
        thought="<|channel|>analysis",
    ),
    Family("gemma3", "gemma3", 262_208, _GEMMA3, eos="<end_of_turn>", bos="<bos>"),
    Family("deepseek-v3", "deepseek-v3", 129_280, _DEEPSEEK_V3, **_DEEPSEEK_TOKENS),
    Family("deepseek-v3.1", "deepseek-v3", 129_280, _DEEPSEEK_V31, **_DEEPSEEK_TOKENS),
    Family("mistral", "mistral", 131_072, _MISTRAL, eos="</s>", bos="<s>", call="[TOOL_CALLS]"),
)
