"""Templates from anywhere: they render as the known ones do, and what loops or gobbles memory is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from slipstream.chat.foreign import ForeignTemplate, template_of
from slipstream.chat.template import ChatTemplate
from slipstream.errors import InvalidRequestError, ModelError
from slipstream.models import Model
from slipstream.sandbox import Allowance
from slipstream.tokenizer.provenance import content, origin
from tests.unit.test_chat import VARIABLES

SOURCE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
Make = Callable[[str], ForeignTemplate]


@pytest.fixture
def foreign() -> Iterator[Make]:
    """Makes templates that may take little."""
    made: list[ForeignTemplate] = []

    def make(source: str) -> ForeignTemplate:
        made.append(ForeignTemplate(source, VARIABLES, little))
        return made[-1]

    little = Allowance(seconds=1, memory=2**28)
    yield make
    for template in made:
        template.close()


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content(text, origin(0))}]


def test_a_sandbox_makes_no_difference(foreign: Make) -> None:
    there, here = foreign(SOURCE), ChatTemplate(SOURCE, VARIABLES)
    assert (there.variables, there.shown) == (here.variables, here.shown)
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    for text in (" Hello <|im_end|> ", "\N{WATER WAVE}\0", ""):
        one, other = (template.render(said(text), tools, {"x": 1}) for template in (there, here))
        assert (str.__str__(one), one.mask) == (str.__str__(other), other.mask)


def test_refusals_keep_their_words(foreign: Make) -> None:
    template = foreign("{{ raise_exception('No ' ~ messages[0].role) if messages[0].content == 'no' }}")
    with pytest.raises(InvalidRequestError, match="refuses these messages: No user"):
        template.render(said("no"))
    assert template.render(said("yes")) == ""


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", id="loops"),
        pytest.param("{{ 'a' * 10 ** 9 }}", id="repeats"),
        pytest.param("{{ '%1000000000d' % 1 }}", id="pads"),
        pytest.param("{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
                     id="doubles"),
        pytest.param("{{ (9 ** (9 ** (8 + messages | length))) % 7 }}", id="raises to a power"),
        pytest.param("{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}", id="recurses"),
    ],
)  # fmt: skip
def test_what_takes_too_much_is_refused_and_the_next_is_rendered(foreign: Make, hostile: str) -> None:
    template = foreign("{% if messages[0].content == 'go' %}" + hostile + "{% endif %}{{ messages[0].content }}")
    with pytest.raises(InvalidRequestError, match="chat template") as caught:
        template.render(said("go"))
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_messages")
    assert template.render(said("stay")) == "stay"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", id="loops"),
        pytest.param("{% if a %}" * 5000 + "{% endif %}" * 5000, id="deep"),
        pytest.param("{{ " + "(" * 5000 + "a" + ")" * 5000 + " }}", id="brackets"),
        pytest.param("{% if %}", id="no template"),
    ],
)
def test_a_model_whose_template_takes_too_much_is_not_loaded(foreign: Make, source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        foreign(source)


@pytest.mark.parametrize("depth", [100, 5000])
def test_a_deep_template_is_the_model_s_fault_here_too(depth: int) -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if a %}" * depth + "{% endif %}" * depth, {})


def test_the_default_model_s_template_needs_no_sandbox(model: Model) -> None:
    assert isinstance(template_of(model.chat_template or "", {}), ChatTemplate)
