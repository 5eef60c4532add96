"""From a list of messages to the token ids of a prompt, exact down to what the model generated before."""

import re
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix  # of any texts, not of paths

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.chat.answers import Dialect
from slipstream.chat.ledger import Ledger, LedgerEntry
from slipstream.chat.messages import Digest, Message, digest, digests
from slipstream.chat.template import ChatTemplate
from slipstream.chat.tools import NO_TOOLS, ToolUse
from slipstream.errors import InvalidRequestError
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced, content

_MARK = re.compile("slipstream[0-9a-f]{32}")

_PROBES = ('{"a": 1}', "Yes", "12", "\n", "- x")
"""Texts of which no two begin alike."""

_RECENT_PROMPTS = 64
"""Prompts that are kept for who asks again: for another answer, or after having appended to a session."""

LEDGER_TOKENS = 16 * 2**20
"""Token ids that the ledger keeps by default: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for its next assistant message. `token_ids` is int32 [n]."""

    token_ids: IntArray
    conversation_id: str
    key: Digest
    """Stands for the messages."""
    parent: Digest | None
    """The conversation in the ledger that the prompt extends."""
    parent_length: int
    """How many of the token ids are that conversation's."""
    opens_reasoning: bool = False
    """Whether the template already began the reasoning that the answer goes on with."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the ledger knows of a conversation that was answered: its last part, and all of its token ids, int32 [n]."""

    key: Digest
    entry: LedgerEntry
    token_ids: IntArray


class Conversations:
    """Turns messages into prompts, and remembers which tokens each answer was made of.

    A client sends the whole conversation each time. Messages that were seen before keep the token ids that they had
    then, whatever the template or the tokenizer would make of them now; only what follows the last known answer is
    rendered and tokenised. Thread-safe.
    """

    def __init__(
        self,
        template: ChatTemplate | None,
        tokenizer: Tokenizer,
        dialect: Dialect,
        *,
        ledger_tokens: int = LEDGER_TOKENS,
    ) -> None:
        self._template = template
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._ledger = Ledger(ledger_tokens)
        self._lock = threading.Lock()
        self._recent: dict[tuple[Digest, Digest | None], Prompt] = {}  # oldest first
        self._certain_tails: dict[tuple[bool, bool], IntArray] = {}
        self.renders: Counter[str] = Counter()
        """Prompts by how they were made: `first` (nothing known), `spliced`, `full` (known, but the template refused),
        `repeated` (just made before)."""

    def prompt(self, messages: Sequence[Message], use: ToolUse = NO_TOOLS, *, tenant: str = "") -> Prompt:
        """The prompt for the next answer. Tools are part of it whether they may be called or not.

        Raises `InvalidRequestError` if the model has no chat template or its template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions, or pull a model that is made for chat"
            )
        if not messages:
            raise InvalidRequestError("messages is empty: send at least one", param="messages", code="invalid_value")
        chain = self._chain(messages, use, tenant)
        known = self._last_known(chain)
        node = known.key if known is not None else None
        recent = self._recent.get((chain[-1], node))
        if recent is not None:
            self.renders["repeated"] += 1
            return recent
        prompt = self._made(messages, use, chain, known)
        with self._lock:
            self._recent[chain[-1], node] = prompt
            if len(self._recent) > _RECENT_PROMPTS:
                del self._recent[next(iter(self._recent))]
        return prompt

    def record(self, prompt: Prompt, answer: Message, token_ids: Sequence[int], text: str) -> Part | None:
        """Remember that `answer` was generated after `prompt` as these token ids (without the stop token).

        `text` is what was generated and shown, before calls and reasoning were taken out of it. Where a stop string
        cut it short, the tokens are cut to match; if no token ends there, the answer can't be told in whole tokens and
        is left to be rendered like a stranger's: then nothing is returned.
        """
        kept = self._tokens_spelling(text, token_ids)
        if kept is None:
            return None
        ids = np.concatenate((prompt.token_ids[prompt.parent_length :], np.asarray(kept, np.int32)))
        key = digest(prompt.key, answer.canonical())
        with self._lock:
            self._ledger.add(key, LedgerEntry(prompt.parent, ids, prompt.conversation_id))
            return self._part(key)

    def restore(self, key: Digest, entry: LedgerEntry) -> None:
        """Put back what was recorded once; parents before their children."""
        with self._lock:
            self._ledger.add(key, entry)

    def known(self, messages: Sequence[Message], use: ToolUse = NO_TOOLS, *, tenant: str = "") -> Part | None:
        """As much of a conversation as ends with an answer in the ledger."""
        return self._last_known(self._chain(messages, use, tenant))

    def path(self, key: Digest) -> list[tuple[Digest, int]]:
        """The parts of a conversation in the ledger, from its start, and the tokens up to the end of each."""
        with self._lock:
            return self._ledger.path(key) if self._ledger.get(key) is not None else []

    def certain_tail(self, answer: Message, use: ToolUse = NO_TOOLS) -> IntArray:
        """The token ids that follow an answer like this one, whatever comes next, int32 [n].

        Found by rendering results, or questions, that have nothing in common; a guess that costs nothing if it's wrong.
        """
        kind = (bool(answer.tool_calls), bool(use.tools))
        if (known := self._certain_tails.get(kind)) is not None:
            return known
        role, call_id = ("tool", answer.tool_calls[0].id) if answer.tool_calls else ("user", None)
        tails = [
            self._tail([Message("user", "?"), answer, Message(role, probe, tool_call_id=call_id)], use, 1)
            for probe in _PROBES
        ]
        certain = commonprefix([tail or content("") for tail in tails])  # noqa: RUF071
        self._certain_tails[kind] = ids = np.asarray(self._tokenizer.encode(certain), np.int32)
        return ids

    def _made(self, messages: Sequence[Message], use: ToolUse, chain: list[Digest], known: Part | None) -> Prompt:
        """The prompt, rendered from what follows the last known answer."""
        if known is not None:
            index, tokens = chain.index(known.key), known.token_ids
            tail = self._tail(messages, use, index)
            if tail is not None:
                self.renders["spliced"] += 1
                ids = np.concatenate((tokens, np.asarray(self._tokenizer.encode(tail), np.int32)))
                opened = self._dialect.reasoning.opened_by(tail)
                return Prompt(ids, known.entry.conversation_id, chain[-1], chain[index], len(tokens), opened)
        self.renders["full" if known else "first"] += 1
        text = self._render(messages, use)
        ids = np.asarray(self._tokenizer.encode(text), np.int32)
        conversation_id = known.entry.conversation_id if known else f"conv_{secrets.token_hex(12)}"
        return Prompt(ids, conversation_id, chain[-1], None, 0, self._dialect.reasoning.opened_by(text))

    @staticmethod
    def _chain(messages: Sequence[Message], use: ToolUse, tenant: str) -> list[Digest]:
        return digests(digest(digest(b"", tenant), use.canonical()), messages)

    def _last_known(self, chain: list[Digest]) -> Part | None:
        with self._lock:
            return next((part for key in reversed(chain) if (part := self._part(key)) is not None), None)

    def _part(self, key: Digest) -> Part | None:
        entry = self._ledger.get(key)
        return Part(key, entry, self._ledger.tokens(key)) if entry is not None else None

    def _render(self, messages: Sequence[Message], use: ToolUse) -> Traced:
        assert self._template is not None
        form = self._dialect.tool_format
        return self._template.render(form.messages(messages, use), form.template_tools(use))

    def _tail(self, messages: Sequence[Message], use: ToolUse, index: int) -> Traced | None:
        """The text that follows message `index`; None if the template does not say where that is.

        It is asked twice: for that text, and, with a mark in place of each message's text, for the order in which it
        renders them. A template that moves messages has to render all of them anew.
        """
        marks = [f"slipstream{secrets.token_hex(16)}" for _ in messages]
        known = replace(messages[index], text=marks[index], tool_calls=())
        marked = [replace(message, text=mark) for message, mark in zip(messages, marks, strict=True)]
        try:
            text = self._render([*messages[:index], known, *messages[index + 1 :]], use)
            order = _MARK.findall(self._render([*marked[:index], known, *marked[index + 1 :]], use))
        except InvalidRequestError:
            return None
        # Texts before the known answer, and those beside calls, may be left out; nothing else may.
        expected = [
            mark
            for at, (mark, message) in enumerate(zip(marks, messages, strict=True))
            if mark in order or (at >= index and not message.tool_calls)
        ]
        before, found, _ = text.partition(marks[index])
        return text[len(before) + len(found) :] if found and order == expected else None

    def _tokens_spelling(self, text: str, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens, or as many of them as spell the text."""
        for length in range(len(token_ids), -1, -1):
            decoded = self._tokenizer.decode(token_ids[:length], shown=self._dialect.token_ids)
            if decoded == text:
                return token_ids[:length]
            if len(decoded) < len(text):
                break
        return None
