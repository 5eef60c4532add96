"""Grammars of a text, as grammars of the JSON string that holds it.

A custom tool's input fits a regular expression or a Lark grammar, but a model writes it in JSON: each line end as a
backslash and an `n`. So each character that a literal or an expression allows is spelled as it is escaped there.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from re import _constants as op  # type: ignore[attr-defined]  # the parser of `re`, private but stable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.regex import ANY, EMPTY, Chars, Range, Regex, Repeat, inverted, one_of
from slipstream.chat.schema.regex_writing import JSON, either, sequence, terminal
from slipstream.chat.setting import TextGrammar

_ESCAPES = frozenset("\\'\"abfnrtvxuU01234567")
"""What stands after a backslash in Python's literals, named characters aside."""
_COMMON = {
    "LF": r"/\n/",
    "CR": r"/\r/",
    "NEWLINE": r"/(\r?\n)+/",
    "WS": r"/[ \t\f\r\n]+/",
    "WS_INLINE": r"/[ \t]+/",
    "DIGIT": "/[0-9]/",
    "INT": "/[0-9]+/",
    "NUMBER": r"/[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
    "LETTER": "/[A-Za-z]/",
    "WORD": "/[A-Za-z]+/",
    "CNAME": "/[A-Za-z_][A-Za-z0-9_]*/",
    "ESCAPED_STRING": r'/"([^"\\\n]|\\.)*"/',
}
"""What grammars import from Lark's `common`."""
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*)|(?P<range>"(?:[^"\\]|\\.)+"\s*\.\.\s*"(?:[^"\\]|\\.)+")"""
    r"""|(?P<text>"(?:[^"\\\n]|\\.)*")(?P<fold>i?)|/(?P<regex>(?:[^/\\\n]|\\.)+)/(?P<flags>[a-z]*)"""
    r"""|(?P<alias>->\s*\w+)|(?P<name>(?:^[?!]{1,2})?[A-Za-z_]\w*)(?P<priority>\.-?\d+)?"""
    r"""|(?P<other>\.\.|[:|()\[\]?*+~{},])|(?P<number>\d+)""",
    re.MULTILINE,
)


def text_rules(grammar: TextGrammar, prefix: str) -> list[str]:
    """Lark rules for the inside of a JSON string that holds a text of the grammar, from `{prefix}start` on.

    Raises `UnsupportedError` for what can't be expressed, and `ValueError` for what is no such grammar. What is one for
    llguidance alone passes for neither: it could name tokens.
    """
    try:
        if grammar.syntax == "regex":
            return [f"{prefix}start: {_expression(grammar.definition, '')}"]
        return list(_rules(grammar.definition, prefix))
    except RecursionError:
        raise UnsupportedError("it is nested too deeply") from None


def _rules(definition: str, prefix: str) -> Iterator[str]:
    imported: dict[str, str] = {}
    lines: list[str] = []
    for line in definition.splitlines():
        if match := re.match(r"\s*%import\s+common\.(\w+)(?:\s*->\s*(\w+))?\s*$", line):
            if match[1] not in _COMMON:
                raise UnsupportedError(f"common.{match[1]} is not known")
            imported[match[2] or match[1]] = _COMMON[match[1]]
        elif re.match(r"\s*%", line):
            raise UnsupportedError(f"{line.split()[0]} is not supported")
        else:
            lines.append(line.strip())
    yield _converted("\n".join(lines), prefix)
    for name, expression in imported.items():
        yield f"{_named(name, prefix)}: {_converted(expression, prefix)}"


def _converted(text: str, prefix: str) -> str:
    """A piece of a grammar, with its literals and expressions as JSON spells them, and its names with a prefix."""
    made, at = [], 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"{text[at : at + 20]!r} is not understood")
        at = token.end()
        if token["space"] is not None:
            made.append(token["space"] if token["space"].isspace() else "")
        elif token["range"] is not None:
            first, last = (re.escape(_spelled(each)) for each in re.findall(r'"(?:[^"\\]|\\.)+"', token["range"]))
            made.append(_expression(f"[{first}-{last}]", ""))
        elif token["text"] is not None:
            made.append(_expression(re.escape(_spelled(token["text"])), token["fold"]))
        elif token["regex"] is not None:
            made.append(_expression(token["regex"].replace("\\/", "/"), token["flags"]))
        elif token["name"] is not None:
            made.append(_named(token["name"].lstrip("?!"), prefix))
        elif token["alias"] is None:
            made.append(f"{token['other'] or token['number'] or ''} ")  # or a `?` would be the next name's
    return "".join(made)


def _named(name: str, prefix: str) -> str:
    """A name in a grammar of many: rules have small letters, terminals capitals."""
    return f"{prefix.upper()}{name}" if name.lstrip("_")[:1].isupper() else f"{prefix}{name}"


def _spelled(literal: str) -> str:
    """The text of a literal, which has Python's escapes; what is none stands as it is."""
    known = re.sub(r"\\(.)", lambda escape: escape[0] if escape[1] in _ESCAPES else f"\\{escape[0]}", literal)
    try:
        text = str(ast.literal_eval(known))
        text.encode()
    except (SyntaxError, UnicodeEncodeError):
        raise ValueError(f"{literal} is not understood") from None
    return text


def _expression(pattern: str, flags: str) -> str:
    """A Lark expression of JSON's spelling of what a regular expression matches."""
    codes = {"i": re.IGNORECASE, "s": re.DOTALL, "m": re.MULTILINE, "x": re.VERBOSE, "u": re.UNICODE, "l": 0}
    try:
        parsed = _parser.parse(pattern, sum(codes[flag] for flag in set(flags)))
    except KeyError as error:
        raise UnsupportedError(f"the flag {error} of /{pattern}/ is not supported") from None
    except (re.error, OverflowError) as error:
        # Other dialects have escapes and groups that Python lacks.
        foreign = str(error).startswith(("bad escape", "unknown extension", "global flags"))
        kind = UnsupportedError if foreign else ValueError
        raise kind(f"/{pattern}/ is not understood: {error}") from None
    return terminal(_sequence(parsed, parsed.state.flags), JSON)


def _sequence(parsed: Any, flags: int) -> Regex:
    return sequence(_node(kind, value, flags) for kind, value in parsed)


def _node(kind: Any, value: Any, flags: int) -> Regex:  # noqa: PLR0911 - one for each kind
    """One part of a parsed expression."""
    if kind in (op.LITERAL, op.NOT_LITERAL):
        return Chars(tuple(_cases(value, value, flags)), negated=kind is op.NOT_LITERAL)
    if kind is op.ANY:
        return ANY if flags & re.DOTALL else Chars(((10, 10),), negated=True)
    if kind is op.IN:
        return _set(value, flags)
    if kind is op.BRANCH:
        return either(_sequence(branch, flags) for branch in value[1])
    if kind is op.SUBPATTERN and not (value[1] or value[2]):  # flags of its own
        return _sequence(value[3], flags)
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
        least, most, repeated = value
        return Repeat(_sequence(repeated, flags), least, None if most is op.MAXREPEAT else most)
    if kind is op.AT and value in (op.AT_BEGINNING, op.AT_BEGINNING_STRING, op.AT_END, op.AT_END_STRING):
        return EMPTY  # the expression is of the whole anyway
    raise UnsupportedError(f"{str(kind).lower()} is not supported")


def _set(items: Sequence[tuple[Any, Any]], flags: int) -> Regex:
    ranges: list[Range] = []
    categories: list[tuple[str, bool]] = []
    for kind, value in items:
        if kind is op.CATEGORY:
            ranges += _CATEGORIES[value].ranges
            categories += _CATEGORIES[value].categories
        elif kind is not op.NEGATE:
            first, last = (value, value) if kind is op.LITERAL else value
            ranges += _cases(first, last, flags)
    return one_of(ranges, categories, negated=items[0][0] is op.NEGATE)


def _cases(first: int, last: int, flags: int) -> Iterator[Range]:
    """A range of characters; with its other case, if none counts."""
    yield first, last
    others = chr(first).swapcase() + chr(last).swapcase()
    if flags & re.IGNORECASE and chr(first).isalpha() and len(others) == 2 and others[0] <= others[1]:  # ß has none
        yield ord(others[0]), ord(others[1])


_SPACES = (
    *((0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
_CATEGORIES = {
    op.CATEGORY_DIGIT: Chars(categories=(("Nd", False),)),
    op.CATEGORY_NOT_DIGIT: Chars(categories=(("Nd", True),)),
    op.CATEGORY_SPACE: Chars(_SPACES),
    op.CATEGORY_NOT_SPACE: Chars(inverted(_SPACES)),
    op.CATEGORY_WORD: Chars(categories=tuple((name, False) for name in ("L", "M", "Nd", "Nl", "Pc"))),
    op.CATEGORY_NOT_WORD: Chars(
        categories=tuple((name, False) for name in ("No", "Z", "S", "C", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"))
    ),
}
