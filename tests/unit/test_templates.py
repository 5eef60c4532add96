"""The script that runs folders of templates through the chat layer finds what is wrong with them."""

from pathlib import Path

from tests.templates import Report, reports

GOOD = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for call in message.tool_calls %}
{{- '<tool_call>\n' }}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{{- '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}"""


def test_what_is_wrong_with_a_template_is_reported(tmp_path: Path) -> None:
    sources = {
        "broken": "{% if %}",
        "good": GOOD,
        "moving": GOOD.replace("in messages %}", "in messages | reverse %}"),
        "refusing": "{% if messages | length > 3 %}{{ raise_exception('no more') }}{% endif %}" + GOOD,
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.jinja").write_text(source)
    found: dict[str, Report] = {report.name: report for report in reports(tmp_path)}
    assert found.keys() == sources.keys()
    assert "does not compile" in found["broken"].error
    assert "no more" in found["refusing"].error
    assert {*found["moving"].delta.values()} == {"full"}
    good = found["good"]
    assert (good.format, good.reasoning, good.calls, good.error) == ("hermes", "-", "valid", "")
    assert {*good.delta.values()} == {"delta"}
    assert [report.name for report in found.values() if report.sound] == ["good", "moving"]
