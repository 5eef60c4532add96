"""What an answer must fit: its grammar, and what of its schemas the grammar leaves out."""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from slipstream import fields
from slipstream.chat import Schema, Tool, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.formats import AnswerGrammar
from slipstream.chat.formats.base import TEXT
from slipstream.chat.messages import Digest, digest
from slipstream.chat.schema import Loss
from slipstream.chat.setting import TextGrammar, place_of
from slipstream.engine.grammar import (
    TOO_COMPLEX,
    TRIAL_LIMITS,
    UNSUPPORTED,
    Grammar,
    GrammarBrokenError,
    GrammarCompiler,
    TrialDiedError,
)
from slipstream.errors import InvalidRequestError
from slipstream.recent import Recent

_RECENT = 64
_COMPLEX = "a schema that takes too much to compile"
_ANY_OBJECT: Schema = {"type": "object", "additionalProperties": True}


@dataclass(frozen=True, slots=True)
class Demand:
    """The grammar of an answer, or None for free text, and the keywords that it leaves out."""

    grammar: Grammar | None = None
    losses: tuple[Loss, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer to a tenant's request is to fit: calls of tools, or JSON of a schema.

    A schema that is not `strict` is loosened where it can't be enforced, and costs its request nothing else.
    """

    tenant: str
    use: ToolUse
    schema: Schema | None
    opens_reasoning: bool
    strict: bool


class Demands:
    """Makes grammars of tools and response schemas. Thread-safe."""

    def __init__(self, dialect: Dialect, grammars: GrammarCompiler) -> None:
        self._dialect = dialect
        self._grammars = grammars
        self._lock = threading.Lock()
        self._recent: Recent[Digest, AnswerGrammar | None] = Recent(_RECENT)

    def demand(self, wanted: Wanted) -> Demand:
        """The grammar of an answer; raises `InvalidRequestError` for what has to be enforced and can't be."""
        field = fields.TOOLS if wanted.use.callable else fields.RESPONSE_SCHEMA
        key = digest(repr(replace(wanted, strict=False)))  # which is checked each time
        with self._lock:
            known, written = key in self._recent, self._recent.get(key)
        if not known:
            try:
                written = self._written(wanted)
            except (InvalidRequestError, RecursionError) as error:
                written = self._loosened(wanted, error)
            with self._lock:
                self._recent[key] = written
        if written is None:
            return Demand()
        self._refuse(written.losses, wanted.use, strict=wanted.strict)
        return Demand(self._grammars.compile(written.source, param=field, tenant=wanted.tenant), written.losses)

    def _written(self, wanted: Wanted) -> AnswerGrammar | None:
        """The text of a grammar; raises `InvalidRequestError` or `RecursionError` if it does not compile."""
        written = self._dialect.grammar(wanted.use, wanted.schema, opens_reasoning=wanted.opens_reasoning)
        if written is not None:
            self._grammars.check(written.source, param=fields.TOOLS, tenant=wanted.tenant)
        return written

    def _loosened(self, wanted: Wanted, error: Exception) -> AnswerGrammar:
        """The same without the schemas that keep it from compiling; raises the error if there are none such."""
        losses: list[Loss] = []
        tools = []
        use, schema = wanted.use, wanted.schema
        allowed = {tool.name for tool in use.callable}
        for index, tool in enumerate(use.tools):
            if tool.name in allowed and (fault := self._fault(wanted, ToolUse((tool,), "required"))) is not None:
                if tool.text is None:
                    if tool.strict:
                        raise _refused(fields.TOOL_PARAMETERS.at(place_of(use.tools, index)), tool, _COMPLEX, fault)
                    losses.append(Loss(_COMPLEX, tool.name))
                    tool = replace(tool, parameters=_ANY_OBJECT)  # noqa: PLW2901
                else:
                    if isinstance(fault, InvalidRequestError) and fault.code == UNSUPPORTED:
                        raise _broken(place_of(use.tools, index), tool, fault)
                    losses.append(Loss("it takes too much to compile", tool.name, of_text=True))
                    tool = replace(tool, text=TextGrammar())  # noqa: PLW2901
            tools.append(tool)
        if schema is not None and (fault := self._fault(wanted, ToolUse(), schema)) is not None:
            if wanted.strict:
                raise _refused(fields.RESPONSE_SCHEMA, None, _COMPLEX, fault)
            losses.append(Loss(_COMPLEX))
            schema = {}
        if not losses:
            field = fields.TOOLS if allowed else fields.RESPONSE_SCHEMA
            if isinstance(error, InvalidRequestError) and error.code == UNSUPPORTED:  # but each schema is supported
                raise GrammarBrokenError from error
            raise _refused(field, None, "schemas", error) from error
        use = replace(use, tools=tuple(tools))
        written = self._dialect.grammar(use, schema, opens_reasoning=wanted.opens_reasoning)
        assert written is not None
        return replace(written, losses=(*losses, *written.losses))

    def _fault(self, wanted: Wanted, use: ToolUse, schema: Schema | None = None) -> Exception | None:
        """Why a schema doesn't compile alone; None if it does."""
        try:
            self._written(replace(wanted, use=use, schema=schema, opens_reasoning=False))
        except (InvalidRequestError, RecursionError) as error:
            return error
        return None

    @staticmethod
    def _refuse(losses: Iterable[Loss], use: ToolUse, *, strict: bool) -> None:
        """Raise the error of a strict schema of which something is left out, if there is one."""
        places = {tool.name: (index, tool) for index, tool in enumerate(use.tools)}
        for loss in losses:
            if loss.tool is None and strict:
                raise _refused(fields.RESPONSE_SCHEMA, None, loss.keyword)
            if loss.tool is not None and places[loss.tool][1].strict:
                index, tool = places[loss.tool]
                raise _refused(fields.TOOL_PARAMETERS.at(place_of(use.tools, index)), tool, loss.keyword)


def _broken(place: int | str, tool: Tool, fault: InvalidRequestError) -> InvalidRequestError:
    """The error of a grammar of text that is read, but means nothing: a name in it may not be defined."""
    complaint = re.sub(rf"call_\d+{TEXT}", "", str(fault).rpartition("can't be enforced: ")[2], flags=re.IGNORECASE)
    return InvalidRequestError(fields.TOOL_TEXT.at(place), f" of the tool {tool.name!r} is no grammar: {complaint}")


def _refused(
    field: fields.Field, tool: Tool | None, keyword: str, cause: Exception | None = None
) -> InvalidRequestError:
    """The error of a schema that has to be enforced and can't be."""
    whose = f" of the tool {tool.name!r}" if tool is not None else ""
    if isinstance(cause, RecursionError):
        return InvalidRequestError(
            field, f"{whose} has a schema that is nested too deeply: flatten it, or use $ref", code=TOO_COMPLEX
        )
    if cause is not None:
        code = cause.code if isinstance(cause, InvalidRequestError) else TOO_COMPLEX
        limits = TRIAL_LIMITS if isinstance(cause, TrialDiedError) else ()
        return InvalidRequestError(field, f"{whose} has {keyword}", *limits, ": simplify it", code=code)
    what = keyword if " " in keyword else repr(keyword)
    complaint = f"{whose} has {what}, which can't be enforced: leave it out, or leave out strict"
    return InvalidRequestError(field, complaint, code=UNSUPPORTED)
