"""JSON Schemas as rules of a Lark grammar."""

import json
from dataclasses import dataclass
from functools import lru_cache

from slipstream.chat.schema.json_rules import JsonRules, shared_rules
from slipstream.chat.schema.losses import Loss, UnsupportedError
from slipstream.chat.schema.meaning import Meaning
from slipstream.chat.schema.objects import Member
from slipstream.chat.schema.shapes import Node, Objects, Strings
from slipstream.chat.setting import Schema

__all__ = [
    "NOTHING_FITS",
    "Arguments",
    "JsonRules",
    "Loss",
    "Meaning",
    "Written",
    "arguments_rules",
    "json_rules",
    "literal",
    "rules_of_arguments",
    "shared_rules",
]

NOTHING_FITS = "a schema that nothing fits"
"""The loss of a schema that contradicts itself."""


@dataclass(frozen=True, slots=True)
class Written:
    """Lark rules, and the keywords of the schema that they leave out."""

    rules: list[str]
    losses: tuple[str, ...] = ()


def json_rules(rule: str, schema: Schema) -> Written:
    """Lark rules for JSON that fits the schema, from one of this name."""
    values = JsonRules(Meaning(schema), rule)
    return _written(rule, values, values.meaning.root, "json_any")


def arguments_rules(rule: str, parameters: Schema) -> Written:
    """The same for the parameters of a function: always an object, and an empty one if nothing is said of it."""
    return rules_of_arguments(rule, JsonRules(Meaning(parameters), rule), "json_object")


def rules_of_arguments(rule: str, values: JsonRules, otherwise: str) -> Written:
    """The same in another notation, which has a rule for any object otherwise."""
    return _written(rule, values, values.meaning.arguments, otherwise)


def _written(rule: str, rules: JsonRules, node: Node, otherwise: str) -> Written:
    try:
        start = otherwise if rules.is_nothing(node) else rules.expression(node)
    except UnsupportedError as error:
        rules.meaning.lose(str(error))
        return Written([f"{rule}: {otherwise}"], tuple(rules.meaning.losses))
    if start == otherwise and not rules.rules:
        rules.meaning.lose(NOTHING_FITS)
    return Written([f"{rule}: {start}", *rules.rules], tuple(rules.meaning.losses))


class Arguments:
    """A function's parameters, for formats that write one argument after the other."""

    def __init__(self, parameters: Schema, prefix: str = "value") -> None:
        self.meaning = Meaning(parameters)
        self.values = JsonRules(self.meaning, prefix)
        self.forms = self._forms()
        """The ways to write them, each with its members in order. Keys that the schema doesn't list are left out."""

    def _forms(self) -> list[tuple[Member, ...]]:
        shapes = self.meaning.shapes(self.meaning.arguments)
        forms = [form for shape in shapes if isinstance(shape, Objects) for form in self.values.forms(shape)]
        if not forms:
            self.meaning.lose(NOTHING_FITS)
        for form in forms:
            if form.least > sum(member.required for member in form.members):
                self.meaning.lose("minProperties")
            if form.most is not None and form.most < len(form.members):
                self.meaning.lose("maxProperties")
        return [form.members for form in forms] or [()]

    @property
    def texts(self) -> frozenset[str]:
        """The names of those that are texts whatever form is chosen, and stand without quotes."""
        members = [member for form in self.forms for member in form]
        others = {member.key for member in members if self.text(member.node) is None}
        return frozenset(member.key for member in members) - others

    def text(self, node: Node) -> list[Strings] | None:
        """The texts of a node; None if it has other values too."""
        shapes = self.meaning.shapes(node)
        texts = [shape for shape in shapes if isinstance(shape, Strings)]
        return texts if texts and len(texts) == len(shapes) else None


@lru_cache(maxsize=256)
def text_arguments(parameters: str) -> frozenset[str]:
    """The names of those parameters that are texts, of a schema as JSON."""
    return Arguments(json.loads(parameters)).texts


def literal(text: str) -> str:
    """The Lark expression of just this text."""
    return json.dumps(text, ensure_ascii=False)
