"""From a list of messages to the token ids of a prompt, exact down to what the model generated before."""

import json
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os.path import commonprefix  # of any texts, not of paths
from typing import Any

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.chat.answers import Dialect
from slipstream.chat.ledger import Ledger, LedgerEntry
from slipstream.chat.messages import Digest, Message, digest, digests
from slipstream.chat.placing import Placing
from slipstream.chat.setting import NO_SETTING, SWITCHES, Setting
from slipstream.chat.template import ChatTemplate
from slipstream.errors import InvalidRequestError
from slipstream.fields import MESSAGES
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced, content, origin

_PROBES = ('{"a": 1}', "Yes", "12", "\n", "- x")
"""Texts of which no two begin alike."""

_RECENT_PROMPTS = 64
"""Prompts that are kept for who asks again: for another answer, or after having appended to a session."""

_RECENT_TAILS = 256

_STAND_IN = "slipstream"

_ENDING_TOKENS = 512
"""How much of an answer is looked for in a rendered conversation, from its end."""

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
        self._certain_tails: dict[Digest, IntArray] = {}  # oldest first
        self.renders: Counter[str] = Counter()
        """Prompts by how they were made: `first` (nothing known), `spliced`, `full` (known, but the template moved
        something), `repeated` (just made before)."""

    def prompt(self, messages: Sequence[Message], setting: Setting = NO_SETTING, *, tenant: str = "") -> Prompt:
        """The prompt for the next answer. Tools are part of it whether they may be called or not.

        Raises `InvalidRequestError` if the model has no chat template or its template refuses the messages.
        """
        setting = self._known_to(setting)
        if not messages:
            raise InvalidRequestError(MESSAGES, " is empty: send at least one")
        chain = self._chain(messages, setting, tenant)
        known = self._last_known(chain)
        node = known.key if known is not None else None
        # What was thought is no part of the chain, since many clients don't send it back.
        key = digest(chain[-1], json.dumps([message.reasoning for message in messages])), node
        recent = self._recent.get(key)
        if recent is not None:
            self.renders["repeated"] += 1
            return recent
        prompt = self._made(messages, setting, chain, known)
        with self._lock:
            self._recent[key] = prompt
            _forget_oldest(self._recent, _RECENT_PROMPTS)
        return prompt

    def beginning(self, messages: Sequence[Message], setting: Setting = NO_SETTING, *, tenant: str = "") -> Prompt:
        """As much of a prompt as is certain while no user has said anything; till then many templates refuse messages.

        Raises what `prompt` raises.
        """
        setting = self._known_to(setting)
        texts = [self._render([*messages, Message("user", probe)], setting) for probe in _PROBES]
        ids = np.asarray(self._tokenizer.encode(commonprefix(texts)), np.int32)  # noqa: RUF071
        return Prompt(ids, f"conv_{secrets.token_hex(12)}", self._chain(messages, setting, tenant)[-1], None, 0)

    @property
    def can_switch_reasoning(self) -> bool:
        """Whether the template can be told not to reason."""
        return self._template is not None and not self._template.variables.isdisjoint(SWITCHES)

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
            self._ledger.add(key, LedgerEntry(prompt.parent, ids, prompt.conversation_id, len(kept)))
            return self._part(key)

    def restore(self, key: Digest, entry: LedgerEntry) -> None:
        """Put back what was recorded once; parents before their children."""
        with self._lock:
            self._ledger.add(key, entry)

    def known(self, messages: Sequence[Message], setting: Setting = NO_SETTING, *, tenant: str = "") -> Part | None:
        """As much of a conversation as ends with an answer in the ledger."""
        return self._last_known(self._chain(messages, self._known_to(setting), tenant))

    def path(self, key: Digest) -> list[tuple[Digest, int]]:
        """The parts of a conversation in the ledger, from its start, and the tokens up to the end of each."""
        with self._lock:
            return self._ledger.path(key) if self._ledger.get(key) is not None else []

    def certain_tail(self, answer: Message, token_ids: IntArray, setting: Setting = NO_SETTING) -> IntArray:
        """The token ids that follow an answer like this one, whatever comes next, int32 [n].

        Found by rendering results, or questions, that have nothing in common; a guess that costs nothing if it's wrong.
        `token_ids` are the conversation's, up to the answer's end.
        """
        setting = self._known_to(setting)
        kind = digest(b"", setting.canonical() + repr([call.name for call in answer.tool_calls]))
        if (known := self._certain_tails.get(kind)) is not None:
            return known
        role, call_id = ("tool", answer.tool_calls[0].id) if answer.tool_calls else ("user", None)
        generated = self._written(token_ids)
        tails = [content("")]
        for probe in _PROBES:
            messages = [Message("user", "?"), answer, Message(role, probe, tool_call_id=call_id)]
            with suppress(InvalidRequestError):
                tail = self._tail(self._render(messages, setting), messages, 1, generated, setting)
                tails.append(tail or content(""))
        certain = commonprefix(tails[1:] or tails)  # noqa: RUF071
        ids = np.asarray(self._tokenizer.encode(certain), np.int32)
        with self._lock:
            self._certain_tails[kind] = ids
            _forget_oldest(self._certain_tails, _RECENT_TAILS)
        return ids

    def _made(self, messages: Sequence[Message], setting: Setting, chain: list[Digest], known: Part | None) -> Prompt:
        """The prompt, rendered from what follows the last known answer."""
        if known is None:
            self.renders["first"] += 1
            text = self._render(messages, setting)
            ids = np.asarray(self._tokenizer.encode(text), np.int32)
            opened = self._dialect.reasoning.opened_by(text)
            return Prompt(ids, f"conv_{secrets.token_hex(12)}", chain[-1], None, 0, opened)
        index, tokens = chain.index(known.key), known.token_ids
        said = messages
        try:
            text = self._render(said, setting)
        except InvalidRequestError:  # some templates refuse what says nothing; what known answers say is not used
            said = [_saying_something(each) if at <= index else each for at, each in enumerate(messages)]
            text = self._render(said, setting)
        opened = self._dialect.reasoning.opened_by(text)
        tail = self._tail(text, said, index, self._written(tokens), setting)
        if tail is None:
            self.renders["full"] += 1
            text = text if said is messages else self._render(messages, setting)
            ids = self._with_answers(text, messages, chain)
            return Prompt(ids, known.entry.conversation_id, chain[-1], None, 0, opened)
        self.renders["spliced"] += 1
        ids = np.concatenate((tokens, np.asarray(self._tokenizer.encode(tail), np.int32)))
        return Prompt(ids, known.entry.conversation_id, chain[-1], chain[index], len(tokens), opened)

    @staticmethod
    def _chain(messages: Sequence[Message], setting: Setting, tenant: str) -> list[Digest]:
        return digests(digest(digest(b"", tenant), setting.canonical()), messages)

    def _last_known(self, chain: list[Digest]) -> Part | None:
        with self._lock:
            return next((part for key in reversed(chain) if (part := self._part(key)) is not None), None)

    def _part(self, key: Digest) -> Part | None:
        entry = self._ledger.get(key)
        return Part(key, entry, self._ledger.tokens(key)) if entry is not None else None

    def _known_to(self, setting: Setting) -> Setting:
        """As much of a setting as the template has names for."""
        if self._template is None:
            advice = "this model has no chat template: send a plain prompt, or take a model that is made for chat"
            raise InvalidRequestError(advice, param=MESSAGES)
        return setting.known_to(self._template.variables)

    def _render(self, messages: Sequence[Message], setting: Setting) -> Traced:
        """The text of the messages, whose content has their numbers for origins."""
        assert self._template is not None
        form, use = self._dialect.tool_format, setting.tools
        traced = [message.traced(origin(number)) for number, message in enumerate(messages)]
        return self._template.render(form.messages(traced, use), form.template_tools(use), setting.template_kwargs)

    def _tail(
        self, text: Traced, messages: Sequence[Message], number: int, generated: str, setting: Setting
    ) -> Traced | None:
        """What follows an answer in the `text` of the messages; None if the template says earlier things after it.

        Where calls, or reasoning alone, don't look as they were generated, some text takes their place.
        """
        placing, answer = Placing(text, len(messages)), messages[number]
        if not placing.in_order:
            return None
        end = placing.end_of(number, answer, generated)
        if end is None and (answer.tool_calls or not answer.text):
            with suppress(InvalidRequestError):
                said = Message("assistant", _STAND_IN)
                text = self._render([*messages[:number], said, *messages[number + 1 :]], setting)
                end = Placing(text, len(messages)).end_of(number, said, _STAND_IN)
        return text[end:] if end is not None else None

    def _with_answers(self, text: Traced, messages: Sequence[Message], chain: Sequence[Digest]) -> IntArray:
        """The token ids of a whole conversation, of known answers those that they were generated as.

        They need not be what tokenising an answer gives. One that the template tells otherwise is rendered like a
        stranger's.
        """
        placing, at = Placing(text, len(messages)), 0
        ids: list[int] = []
        for number, (message, key) in enumerate(zip(messages, chain, strict=True)):
            with self._lock:
                entry = self._ledger.get(key)
            if entry is None:
                continue
            generated = self._tokenizer.decode(entry.answer, skip_special=False)
            end = placing.end_of(number, message, generated)
            start = end - len(generated) if end is not None else 0
            if end is not None and at <= start and str.__eq__(text[start:end], generated):
                ids += [*self._tokenizer.encode(text[at:start]), *map(int, entry.answer)]
                at = end
        return np.asarray(ids + self._tokenizer.encode(text[at:]), np.int32)

    def _written(self, token_ids: IntArray) -> str:
        """The last that a model wrote, control tokens and all."""
        return self._tokenizer.decode(token_ids[-_ENDING_TOKENS:], skip_special=False)

    def _tokens_spelling(self, text: str, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens, or as many of them as spell the text."""
        for length in range(len(token_ids), -1, -1):
            decoded = self._tokenizer.decode(token_ids[:length], shown=self._dialect.token_ids)
            if decoded == text:
                return token_ids[:length]
            if len(decoded) < len(text):
                break
        return None


def _saying_something(message: Message) -> Message:
    empty = message.role == "assistant" and not message.text and not message.tool_calls
    return replace(message, text=_STAND_IN) if empty else message


def _forget_oldest(known: dict[Any, Any], most: int) -> None:
    if len(known) > most:
        del known[next(iter(known))]
