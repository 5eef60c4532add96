"""Grammars that an answer must fit, compiled by llguidance: masks, forced tokens, and what a draft may hold."""

import hashlib
import logging
import re
import string
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from itertools import islice
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from slipstream.engine.trial import TOO_MUCH, matcher_of
from slipstream.errors import InvalidRequestError, SlipstreamError
from slipstream.fields import SANDBOX_MEMORY, SANDBOX_SECONDS
from slipstream.recent import Recent
from slipstream.sandbox import Allowance, Sandbox, SandboxDiedError, SandboxError, on_roomy_stack
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced
from slipstream.types import IntArray

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)

UNSUPPORTED = "unsupported_schema"
"""The code of errors about what the compiler can't express."""

TRIAL_LIMITS = (" (", SANDBOX_SECONDS, ", ", SANDBOX_MEMORY, ")")
"""What an error says of the limits of a trial."""
_DIED = "the sandbox died of it"
"""The verdict on a grammar whose trial ended its process."""
TOO_COMPLEX = "schema_too_complex"
"""The code of errors about what takes too much to compile or to follow."""

MAX_SOURCE = 512 * 1024
"""Characters of a grammar; what tools need is hundreds of times less."""

_GRAMMARS = 256
"""Grammars that are kept."""
_VERDICTS = 1024
"""Grammars of which it's known what a trial came to."""


class GrammarFailedError(InvalidRequestError):
    """A grammar that compiled met a limit of the parser while it was followed."""

    def __init__(self, param: str) -> None:
        message = "a schema is too complex to follow: simplify its patterns and bounds"
        super().__init__(message, param=param, code=TOO_COMPLEX)


class TrialDiedError(InvalidRequestError):
    """The trial of a grammar took more than its sandbox may, or crashed it."""


class GrammarBrokenError(SlipstreamError):
    """A grammar doesn't compile, or an answer doesn't fit it, for which no schema of the request is at fault."""

    def __init__(self) -> None:
        super().__init__("the grammar of the answer is broken, which is the server's fault: please report it")


# What leads to the end of JSON, most welcome first. Letters get literals and identifiers on their way, digits numbers
# and dates; brackets that open come after everything that may stand in their place, so that no recursion is entered.
_CLOSERS = ("}", "]", '"', ",", *"0123456789", *string.ascii_letters, *"-:.@/ ", "[", "{")
# What ends a value in JSON, where the model has one token for it: the longest first, as models write them.
_VALUE_ENDS = ('"}}', '"}', '"]', '",', '"', "}}", "}", "]", ",")


class _Closers:
    """What to try, token by token, on the way to the end of an answer; `ends` beside those of JSON."""

    def __init__(self, tokenizer: LLTokenizer, ends: ListLike[ListLike[int]]) -> None:
        self._ends = [list(end) for end in ends]
        # Of an end that was begun the rest is enough, so that the shorter comes first.
        in_text = [tokenizer.tokenize_str('"'), *self._ends]
        self._text_ends = [end[begun:] for end in in_text for begun in reversed(range(len(end)))]
        self._closers = [tokenizer.tokenize_str(text) for text in _CLOSERS]
        self._digits = [tokenizer.tokenize_str(digit) for digit in string.digits]
        spelled = [tokenizer.tokenize_str(text) for text in _VALUE_ENDS]
        self.value_ends = [tokens[0] for tokens in spelled if len(tokens) == 1]
        """Tokens that may end a value, the fullest first."""

    def next_step(self, matcher: LLMatcher) -> list[int]:
        """Tokens that the matcher allows, and that get it nearer to an end; empty if none is known."""
        if self._in_text(matcher):
            ends = (end for end in self._text_ends if self._leaves_text(matcher, end))
            return next(ends, None) or _allowed(matcher)[:1]  # as inside a value of an enum
        tried = (*self._ends, *self._closers)
        known = [tokens for tokens in tried if matcher.validate_tokens(tokens) == len(tokens)]
        if known and known[0] in self._digits:  # any number of zeros may be allowed, and none bring the end nearer
            ending = (digit for digit in known if digit in self._digits and self._may_end(matcher, digit))
            return next(ending, known[0])
        return known[0] if known else _allowed(matcher)[:1]

    def _in_text(self, matcher: LLMatcher) -> bool:
        """Whether any brackets are allowed, which is so inside of a text alone, where they would lead nowhere."""
        return all(matcher.validate_tokens(bracket) for bracket in self._closers[:2])

    def _leaves_text(self, matcher: LLMatcher, end: list[int]) -> bool:
        if matcher.validate_tokens(end) < len(end):
            return False
        ahead = matcher.deep_copy()
        ahead.consume_tokens(end)
        return ahead.is_accepting() or not self._in_text(ahead)

    def _may_end(self, matcher: LLMatcher, digit: list[int]) -> bool:
        ahead = matcher.deep_copy()
        ahead.consume_tokens(digit)
        return any(ahead.validate_tokens([end]) for end in self.value_ends)


def _allowed(matcher: LLMatcher) -> list[int]:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


class Constraint:
    """A grammar being followed: where an answer stands in it. Not thread-safe.

    All that follow a grammar share a lexer, and one that meets its limits spoils it for the others: from then on it
    takes what it has not seen yet for forbidden, mostly without a word. Those go on with a lexer of their own, so that
    an answer fails only if it would alone.
    """

    __slots__ = ("_accepted", "_bits", "_forced", "_grammar", "_looks_ahead", "_matcher")

    def __init__(self, grammar: "Grammar", matcher: LLMatcher, *, looks_ahead: bool = False) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._looks_ahead = looks_ahead
        self._accepted: list[int] = []
        self._forced: list[int] = []
        self._bits = np.zeros(-(-grammar.vocab_size // 32), np.int32)

    def copy(self) -> "Constraint":
        """An independent constraint at the same place, for a look ahead, which ends where a limit is met."""
        ahead = Constraint(self._grammar, self._matcher.deep_copy(), looks_ahead=True)
        ahead._forced = self._forced.copy()
        return ahead

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the answer can follow."""
        return self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is no choice; they are yet to be accepted.

        Text that is forced could be spelled in other ways too. Once told, the tokens stay the same, whether they are
        then accepted at once or one by one.
        """
        if not self._forced:
            self._forced = self._within_limits(LLMatcher.compute_ff_tokens)
        return self._forced.copy()

    def closing(self, longest: int) -> list[int] | None:
        """A short way from here to where the answer may end, empty if it may end here.

        None if it takes more than `longest` tokens, or if nothing that usually closes things leads there.
        """
        ahead = self._matcher.deep_copy()
        way: list[int] = []
        while not ahead.is_accepting():
            step = ahead.compute_ff_tokens() or self._grammar.closers.next_step(ahead)
            way += step
            if not step or len(way) > longest or not ahead.consume_tokens(step):
                return None
        return way if len(way) <= longest and self._grammar.usable else None

    def accept(self, tokens: ListLike[int]) -> None:
        """Go on by tokens that are allowed.

        Raises `GrammarFailedError` if a limit is met, `GrammarBrokenError` if they are not allowed after all.
        """
        tokens = list(tokens)
        self._within_limits(lambda matcher: matcher.consume_tokens(tokens))
        self._accepted += tokens
        self._forced = self._forced[len(tokens) :] if self._forced[: len(tokens)] == tokens else []

    def valid_prefix(self, tokens: ListLike[int]) -> int:
        """How many of the tokens could come next, in order."""
        return self._matcher.validate_tokens(list(tokens))

    def value_end(self) -> int | None:
        """The token that ends the value here, if one can."""
        ends = self._grammar.closers.value_ends
        return next((token for token in ends if self._matcher.validate_tokens([token])), None)

    def join(self, last: int, forced: int) -> int | None:
        """Take back `last`, the latest token, for one that spells it and the `forced` one after it, if there is one.

        A model that writes both bracket by bracket is rare: it has a token for the two.
        """
        joined = self._grammar.joined(last, forced)
        if joined is None or not self._matcher.rollback(1):
            return None
        if not self._matcher.validate_tokens([joined]):
            self._matcher.consume_tokens([last])
            return None
        self._matcher.consume_tokens([joined])
        self._accepted[-1] = joined
        self._forced = []
        return joined

    def mask(self) -> IntArray:
        """The bits of the tokens that can come next, int32, lowest first; valid until the next call."""
        address, size = self._bits.ctypes.data, self._bits.nbytes
        self._within_limits(lambda matcher: matcher.unsafe_compute_mask_ptr(address, size))
        return self._bits

    def _within_limits(self, step: Callable[[LLMatcher], _Result]) -> _Result:
        """What a step of the matcher gives, on a lexer of its own if the shared one has met its limits."""
        result = step(self._matcher)
        if not self._failed:
            return result
        logger.warning("a grammar failed: %s", self._matcher.get_error())
        if not self._looks_ahead:
            self._grammar = self._grammar.compiled_anew()
            self._matcher = self._grammar.matcher.deep_copy()
            self._matcher.consume_tokens(self._accepted)
            result = step(self._matcher)
        if self._failed:
            raise self._error()
        return result

    def _error(self) -> SlipstreamError:
        """Why the grammar failed: a token that it never allowed is nobody's fault but ours."""
        unfit = "doesn't satisfy the grammar" in self._matcher.get_error()
        return GrammarBrokenError() if unfit and self._grammar.usable else GrammarFailedError(self._grammar.param)

    @property
    def _failed(self) -> bool:
        return self._matcher.is_error() or not self._grammar.usable


class Grammar:
    """A compiled grammar, for any number of answers; `source` is its Lark text, `param` the field it enforces."""

    def __init__(self, source: str, tokenizer: LLTokenizer, vocab_size: int, closers: _Closers, param: str) -> None:
        self.source = source
        self.param = param
        self.vocab_size = vocab_size
        self.closers = closers
        self.matcher = matcher_of(source, tokenizer)
        """At the start; it may have an error, and is yet to be copied."""
        self._tokenizer = tokenizer
        texts = (token for token in _allowed(self.matcher.deep_copy()) if token not in tokenizer.eos_tokens)
        self._first = list(islice(texts, 1))

    @property
    def usable(self) -> bool:
        """Whether no answer has met the limits of the lexer. Takes 2 us: a token is refused at once if one has."""
        return self.matcher.deep_copy().consume_tokens(self._first)

    def constraint(self) -> Constraint:
        """A constraint at the start."""
        return Constraint(self, self.matcher.deep_copy())

    def joined(self, first: int, second: int) -> int | None:
        """The one token that spells two, if there is one."""
        spelled = self._tokenizer.tokenize_bytes(self._tokenizer.decode_bytes([first, second]))
        return spelled[0] if len(spelled) == 1 else None

    def compiled_anew(self) -> "Grammar":
        """The same grammar with a lexer of its own."""
        return Grammar(self.source, self._tokenizer, self.vocab_size, self.closers, self.param)


class GrammarCompiler:
    """Compiles Lark grammars (with llguidance's `%json`) over a model's vocabulary, each distinct one once.

    `vocab_size` is the width of the logits. `ends` are what may end a text or a call in an answer, beside what JSON
    ends with. What nobody has tried is tried first in a process of its own, since a schema can crash the compiler.
    Thread-safe, and meant for other threads than the engine's: a heavy schema takes a while. Making one holds the
    interpreter's lock for a quarter of a second, or more if the vocabulary is large.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        stop_token_ids: Iterable[int],
        ends: Iterable[Traced] = (),
        allowance: Allowance | None = None,
    ) -> None:
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)  # of some tokens a model may have no logits
        json, stops = tokenizer.plain_json(), sorted(stop_token_ids)
        self._tokenizer = LLTokenizer(json, n_vocab=self._vocab_size, eos_token=stops)
        self._closers = _Closers(self._tokenizer, [tokenizer.encode(end, begins=False) for end in ends])
        self._cache: Recent[tuple[str, str], Grammar] = Recent(_GRAMMARS)  # by tenant and source
        self._lock = threading.Lock()
        self._verdicts: Recent[bytes, str] = Recent(_VERDICTS)  # by digests of sources: "" for what is sound
        trial = "slipstream.engine.trial:GrammarTrial"
        self.sandbox = Sandbox(trial, json, self._vocab_size, stops, allowance=allowance)
        """Where grammars are tried; a process that starts with the first."""

    def compile(self, source: str, *, param: str, tenant: str = "") -> Grammar:
        """The grammar of a Lark source. Nobody can tell by the time it takes what another tenant had compiled.

        Raises `InvalidRequestError`, naming the field `param`, for what is too large or can't be expressed.
        """
        with self._lock:
            if (known := self._cache.get((tenant, source))) is not None and known.usable:
                self._cache[tenant, source] = known
                return known
        self.check(source, param=param, tenant=tenant)
        grammar = on_roomy_stack(lambda: Grammar(source, self._tokenizer, self._vocab_size, self._closers, param))
        if error := grammar.matcher.get_error():
            raise _unsupported(param, error)
        with self._lock:
            self._cache[tenant, source] = grammar
        return grammar

    def check(self, source: str, *, param: str, tenant: str = "") -> None:
        """Raise what `compile` would raise, having tried it elsewhere; nothing is compiled here."""
        if len(source) > MAX_SOURCE:
            complaint = f" makes a grammar of {len(source):,} characters; the limit is {MAX_SOURCE:,}. Simplify it"
            raise InvalidRequestError(param, complaint, code="schema_too_large")
        key = hashlib.blake2b(f"{tenant}\n{source}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._tried(source)
        with self._lock:
            self._verdicts[key] = verdict
        if verdict in (TOO_MUCH, _DIED):
            complaint = " has a schema whose grammar takes too much time, memory or stack to compile"
            if verdict == _DIED:
                raise TrialDiedError(param, complaint, *TRIAL_LIMITS, ": simplify it", code=TOO_COMPLEX)
            raise InvalidRequestError(param, complaint, ": simplify it", code=TOO_COMPLEX)
        if verdict:
            raise _unsupported(param, verdict)

    def close(self) -> None:
        """End the process in which grammars are tried."""
        self.sandbox.close()

    def _tried(self, source: str) -> str:
        try:
            return str(self.sandbox.call("run", source))
        except SandboxDiedError:
            return _DIED
        except SandboxError:  # the compiler may panic, too
            return TOO_MUCH


def _unsupported(param: str, error: str) -> InvalidRequestError:
    complaint = f" has a schema that can't be enforced: {_complaint(error)}"
    return InvalidRequestError(param, complaint, code=UNSUPPORTED)


def _complaint(error: str) -> str:
    """What the compiler complains of, without the grammar and the places in it, which the client never saw."""
    lines = [line.strip() for line in error.split("\n<grammar>", maxsplit=1)[0].splitlines()]
    told = [line for line in lines if line and not re.match(r"\d+ \||[\^|(]+$", line)]
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", "; ".join(told[:4])) or "unknown error"
