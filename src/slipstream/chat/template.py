"""A model's own chat template, rendered in a sandbox with what templates on model hubs expect."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from itertools import groupby, product
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from slipstream.errors import InvalidRequestError, ModelError
from slipstream.fields import MESSAGES
from slipstream.tokenizer.provenance import Traced, as_content, joined, made_of, origin


class ChatTemplate:
    """Renders messages to the text that a model was trained on.

    `variables` are offered to the template, as `bos_token` and `eos_token`. Raises `ModelError` if the source does not
    compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source, globals=dict(variables))
            self.variables = frozenset(find_undeclared_variables(environment.parse(source)))
            """What it can be told, by name."""
        except Exception as error:  # a deep one is too much for the parser's stack, or for Python's compiler
            raise ModelError(f"the model's chat template does not compile: {error}") from error
        self._takes_system = self._shows_system()
        rules = [{"role": "system", "content": f"Rule {number}."} for number in "123"]
        self._takes_later_system = self._shows_all(*rules[:2], _USER, rules[2])
        """Whether it shows each system message where it stands. Many show the first alone, or refuse others."""
        self._takes_users_in_a_row = self._shows_all(*({"role": "user", "content": text} for text in ("One?", "Two?")))
        self._lists_tools = self._tried(_USER, tools=None) is None and self._tried(_USER, tools=[]) is not None
        """Whether it goes through the list of tools without asking if there is one."""
        self._no_text: str | None = ""
        """What it takes for the text of an answer that is calls alone."""
        self.shown = "\n".join((source, self._show_call()))
        """Its source, and what it makes of a call."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Traced:
        """The text of `messages` and the beginning of the assistant's next one; `kwargs` are further variables.

        What messages, tools and variables hold, but for roles, is content: none of it can become a control token.
        Strings in them that are `Traced` keep what they know. Where the template has no place for a system message, its
        text goes before that of the first user's; where it has one alone, later ones are the user's; and where it
        refuses several of the user's in a row, they are one.

        Raises `InvalidRequestError` with the template's own words where it refuses the messages.
        """
        try:
            given = [as_content(message) | _role(message) for message in messages]
            for message in given:
                if message.get("tool_calls") and not message["content"]:
                    message["content"] = self._no_text
            if not self._takes_later_system:
                given = _with_one_system(given)
            if not self._takes_system:
                given = _with_user(given)
            if not self._takes_users_in_a_row:
                given = _alternating(given)
            # Tools stand before all that is said. A template that has them elsewhere moves them from turn to turn.
            listed = as_content(tools, origin(0)) if tools or not self._lists_tools else []
            # SmolLM3's templates take tools under the name of the form in which calls are wanted.
            form = {"xml_tools": listed} if "xml_tools" in self.variables else {}
            variables = as_content(kwargs or {}) | form | {"tools": listed}
            text = self._template.render(messages=given, add_generation_prompt=True, **variables)
        except MemoryError:  # no refusal: a sandbox ends with it
            raise
        except Exception as error:  # it's foreign code, and may raise whatever it likes
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param=MESSAGES, code="invalid_messages"
            ) from error
        return joined("", (text,))

    def close(self) -> None:
        """Give back nothing: it holds nothing."""

    def _shows_system(self) -> bool:
        """Whether it makes a difference to the template what a system message says."""
        said = ("Be brief.", "Take your time.")
        rendered = {self._tried({"role": "system", "content": probe}, _USER) for probe in said}
        return None not in rendered and len(rendered) > 1

    def _shows_all(self, *messages: Mapping[str, Any]) -> bool:
        """Whether the template shows the text of each of these messages."""
        rendered = self._tried(*messages)
        return rendered is not None and all(message["content"] in rendered for message in messages)

    def _tried(self, *messages: Mapping[str, Any], **variables: Any) -> str | None:
        """What the template makes of messages; None if it refuses them."""
        try:
            return self._template.render(messages=[dict(message) for message in messages], **variables)
        except MemoryError:
            raise
        except Exception:  # foreign code
            return None

    def _show_call(self) -> str:
        """What the template makes of an answer that is a call, in the way that it takes one; nothing if it takes none.

        Some want arguments as JSON text, and null for the text that isn't there.
        """
        for no_text, arguments in product(("", None), ({"key": "value"}, '{"key": "value"}')):
            function = {"name": _PROBE, "arguments": arguments}
            call = {"id": "call00000", "type": "function", "function": function}
            answer = {"role": "assistant", "content": no_text, "tool_calls": [call]}
            text = self._tried(_USER, answer, tools=[])
            if text is not None and _PROBE in text:
                self._no_text = no_text
                return text
        return ""


def _with_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the text of a leading system message before the first user's."""
    if not messages or messages[0].get("role") != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0].get("role") != "user":
        return [system | {"role": "user"}, *rest]
    first = rest[0] | {"content": joined("\n\n", (system["content"], rest[0]["content"]))}
    return [first, *rest[1:]]


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one system message at most, the leading ones together; what comes later the user says."""
    lead = next((at for at, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    first = [_joined(messages[:lead])] if lead else []
    later = (message | {"role": "user"} if message.get("role") == "system" else message for message in messages[lead:])
    return [*first, *later]


def _alternating(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, where several of the user's in a row are one."""
    result: list[dict[str, Any]] = []
    for is_user, group in groupby(messages, lambda message: message.get("role") == "user"):
        together = list(group)
        result += [_joined(together)] if is_user else together
    return result


def _joined(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of some messages, with the texts of all."""
    texts = [message["content"] for message in messages]
    return messages[0] | {"content": joined("\n\n", texts) if len(texts) > 1 else texts[0]}


def _role(message: Mapping[str, Any]) -> dict[str, Any]:
    """The role, which is one of a few words and may be part of a control token: `<|user|>`."""
    return {"role": message["role"]} if "role" in message else {}


_PROBE = "a_function"
_USER = {"role": "user", "content": "?"}


class _Code(CodeGenerator):
    """Compiles `a ~ b` so that the strings keep what they know."""

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(environment.text, (")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")))")

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:  # noqa: ARG002
        self.fail("autoescape is for pages, not for prompts", node.lineno)


class _Environment(SandboxedEnvironment):
    """A sandbox in which content stays content, whatever a template does to it.

    `Traced` strings look after themselves; here is where templates get at strings in other ways. What can't be followed
    character by character makes content of the whole.
    """

    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "%"))
    concat = staticmethod(lambda pieces: joined("", pieces))

    @staticmethod
    def text(value: Any) -> str:
        """What a template prints of a value."""
        return value if isinstance(value, str) else made_of(str(value), value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left % right`, which formats strings, and `left + right`, where markup knows nothing of tracing."""
        result = super().call_binop(context, operator, left, right)
        return _traced(result, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method in a template."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and function.__name__ == "join":
            return joined(owner, *args)
        result = super().call(context, function, *args, **kwargs)
        return _traced(result, args, kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have it: bytes would forget where they come from."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr == "encode")


def _traced(result: Any, *parts: Any) -> Any:
    """What was made of some values, which knows where it comes from if it's a string."""
    return made_of(result, *parts) if isinstance(result, str) and not isinstance(result, Traced) else result


_CHOOSING = frozenset(("d", "default", "first", "last", "max", "min", "random"))
"""Filters that hand on what they were given."""
_KEEPING = frozenset(("capitalize", "join", "lower", "replace", "string", "trim", "upper"))
"""Filters that leave it to the string's own methods what they make of it."""


def _guarded(function: Callable[..., Any], *, keeps: bool) -> Callable[..., Any]:
    """A filter that makes content of content, unless the string's own methods know better."""

    @wraps(function)
    def filter(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if keeps and isinstance(result, Traced):
            return result
        given = [each for each in args if not isinstance(each, _Environment | Context | nodes.EvalContext)]
        return made_of(result, given, kwargs) if isinstance(result, str) else result

    return filter


@pass_environment
def _join(environment: _Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Traced:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return joined(d, map(environment.text, value))


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag], finalize=_Environment.text
    )
    environment.filters |= {"tojson": _tojson, "join": _join, "string": _Environment.text}
    for name, function in environment.filters.items():
        if name not in _CHOOSING:
            environment.filters[name] = _guarded(function, keeps=name in _KEEPING)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
