"""Grammars of schemas alone."""

from typing import Any

from slipstream.chat.schema import arguments_rules, json_rules, shared_rules


def grammar_of(schema: Any, *, arguments: bool = False) -> str:
    """The Lark grammar of JSON that fits a schema; raises AssertionError if it leaves a keyword out."""
    source, losses = loosened_grammar_of(schema, arguments=arguments)
    assert not losses, losses
    return source


def loosened_grammar_of(schema: Any, *, arguments: bool = False) -> tuple[str, tuple[str, ...]]:
    """The same, and the keywords that it leaves out."""
    written = (arguments_rules if arguments else json_rules)("value", schema)
    rules = ["start: value", *written.rules]
    return "\n".join((*rules, *shared_rules(rules))), written.losses
