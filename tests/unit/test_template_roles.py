"""Messages in an order that agents send and few templates foresee: several of the system's, several of the user's."""

import pytest

from slipstream.chat.template import ChatTemplate

_PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
_LATER = "{% if message.role == 'system' and not loop.first %}"
_STRICT = _PLAIN.replace("%}<", f"%}}{_LATER}{{{{ raise_exception('at the beginning') }}}}{{% endif %}}<", 1)
_FIRST_ALONE = _PLAIN.replace("%}<", "%}{% if message.role != 'system' or loop.first %}<", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)
_ALTERNATING = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for message in rest %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + _PLAIN

SYSTEM, RULE, HELLO, AGAIN, ANSWER = (
    {"role": role, "content": text}
    for role, text in (
        ("system", "Be kind."),
        ("system", "It is Monday."),
        ("user", "Hello."),
        ("user", "Hello?"),
        ("assistant", "Hi."),
    )
)


def rendered(template: str, *messages: dict[str, str]) -> str:
    return str(ChatTemplate(template, {}).render(messages))


def test_template_that_takes_all_gets_them_as_they_are() -> None:
    assert rendered(_PLAIN, SYSTEM, RULE, HELLO, AGAIN, RULE) == (
        "<system>Be kind.<system>It is Monday.<user>Hello.<user>Hello?<system>It is Monday.<assistant>"
    )


@pytest.mark.parametrize("template", [_STRICT, _FIRST_ALONE], ids=["refuses others", "shows the first"])
def test_later_system_messages_are_the_users(template: str) -> None:
    """Claude Code tells its working directory in one, Codex its skills."""
    assert rendered(template, SYSTEM, HELLO, RULE) == "<system>Be kind.<user>Hello.<user>It is Monday.<assistant>"
    assert rendered(template, HELLO, ANSWER, RULE) == "<user>Hello.<assistant>Hi.<user>It is Monday.<assistant>"
    assert rendered(template, SYSTEM, RULE, HELLO) == "<system>Be kind.\n\nIt is Monday.<user>Hello.<assistant>"
    assert rendered(template, HELLO) == "<user>Hello.<assistant>"


def test_messages_of_the_user_in_a_row_are_one_where_roles_must_alternate() -> None:
    assert rendered(_ALTERNATING, SYSTEM, HELLO, AGAIN) == "<system>Be kind.<user>Hello.\n\nHello?<assistant>"
    assert rendered(_ALTERNATING, HELLO, ANSWER, RULE, AGAIN) == (
        "<user>Hello.<assistant>Hi.<user>It is Monday.\n\nHello?<assistant>"
    )
