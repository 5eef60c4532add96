"""Grammars of a text, as grammars of the JSON string that holds it.

A custom tool's input fits a regular expression or a Lark grammar, but a model writes it in JSON: each line end as a
backslash and an `n`. So each character that a literal or an expression allows is spelled as it is escaped there.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from re import _constants as op  # type: ignore[attr-defined]  # the parser of `re`, private but stable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.setting import TextGrammar

_SPECIALS = {code: json.dumps(chr(code))[1:-1] for code in (*range(0x20), 0x22, 0x5C)}
"""What JSON escapes, and how."""
_PLAIN = r'"\\\x00-\x1f'
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
            made.append(_literal(_spelled(token["text"]), fold=bool(token["fold"])))
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


def _literal(text: str, *, fold: bool) -> str:
    if not text:
        return '""'
    return _expression(re.escape(text), "i") if fold else json.dumps(json.dumps(text, ensure_ascii=False)[1:-1])


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
    written = _sequence(parsed, _Flags(parsed.state.flags))
    return f"/{written}/" if written else '""'


class _Flags:
    def __init__(self, flags: int) -> None:
        self.folds = bool(flags & re.IGNORECASE)
        self.dot_all = bool(flags & re.DOTALL)


def _sequence(parsed: Any, flags: _Flags) -> str:
    return "".join(_node(kind, value, flags) for kind, value in parsed)


def _node(kind: Any, value: Any, flags: _Flags) -> str:
    """One part of a parsed expression."""
    written: str | None = None
    if kind is op.LITERAL:
        written = _set([(op.LITERAL, value)], flags)
    elif kind is op.NOT_LITERAL:
        written = _set([(op.NEGATE, None), (op.LITERAL, value)], flags)
    elif kind is op.ANY:
        written = _set([(op.NEGATE, None), *(() if flags.dot_all else ((op.LITERAL, 10),))], flags)
    elif kind is op.IN:
        written = _set(value, flags)
    elif kind is op.BRANCH:
        written = f"({'|'.join(_sequence(branch, flags) for branch in value[1])})"
    elif kind is op.SUBPATTERN and not (value[1] or value[2]):  # flags of its own
        written = f"({_sequence(value[3], flags)})"
    elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
        least, most, repeated = value
        limit = f"{{{least},}}" if most is op.MAXREPEAT else f"{{{least},{most}}}"
        written = f"({_sequence(repeated, flags)}){limit}"
    elif kind is op.AT and value in (op.AT_BEGINNING, op.AT_BEGINNING_STRING, op.AT_END, op.AT_END_STRING):
        written = ""  # the expression is of the whole anyway
    if written is None:
        raise UnsupportedError(f"{str(kind).lower()} is not supported")
    return written


def _set(items: Sequence[tuple[Any, Any]], flags: _Flags) -> str:
    """A set of characters, or any but those: the plain ones as a class, each other one by its escape."""
    negated = bool(items) and items[0][0] is op.NEGATE
    listed = items[1:] if negated else items
    tests = [_member(kind, value) for kind, value in listed]
    escapes = [spelled for code, spelled in _SPECIALS.items() if any(test(code) for test in tests) != negated]
    inner = "".join(_class_item(kind, value, flags) for kind, value in listed)
    ways = [re.sub(r'[\\"/]', r"\\\g<0>", spelled) for spelled in escapes]
    plain = [(kind, value) for kind, value in listed if not (kind is op.LITERAL and value in _SPECIALS)]
    if negated:
        ways.append(f"[^{inner}{_PLAIN}]")
    elif plain:
        ways.append(f"[[{inner}]&&[^{_PLAIN}]]")
    return f"({'|'.join(ways)})"


def _member(kind: Any, value: Any) -> Callable[[int], bool]:
    """Whether an item of a set holds a character that JSON escapes."""
    if kind is op.LITERAL:
        return lambda code: code == value
    if kind is op.RANGE:
        return lambda code: value[0] <= code <= value[1]
    if kind is op.CATEGORY:
        holds = {op.CATEGORY_SPACE: range(9, 14)}.get(value, ())
        outside = value in (op.CATEGORY_NOT_SPACE, op.CATEGORY_NOT_DIGIT, op.CATEGORY_NOT_WORD)
        spaces = range(9, 14) if value is op.CATEGORY_NOT_SPACE else ()
        return (lambda code: code not in spaces) if outside else (lambda code: code in holds)
    raise UnsupportedError(f"{str(kind).lower()} is not supported")


_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}


def _class_item(kind: Any, value: Any, flags: _Flags) -> str:
    """An item of a set as it's written in a class."""
    if kind is op.CATEGORY:
        return _CATEGORIES[value]
    first, last = (value, value) if kind is op.LITERAL else value
    cases = [(first, last)]
    if flags.folds:
        cases += [(ord(chr(first).swapcase()), ord(chr(last).swapcase()))] if chr(first).isalpha() else []
    return "".join(
        f"\\x{{{low:x}}}" if low == high else f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in cases if low <= high
    )
