"""From a list of messages to the token ids of a prompt, exact down to what the model generated before."""

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix  # of any texts, not of paths

from slipstream.chat.answers import Dialect
from slipstream.chat.foreign import Template
from slipstream.chat.ledger import Ledger, LedgerEntry
from slipstream.chat.messages import Digest, History, Message, digest
from slipstream.chat.placing import Placing
from slipstream.chat.rendering import Renderer
from slipstream.chat.setting import NO_SETTING, SWITCHES, Setting
from slipstream.errors import InvalidRequestError
from slipstream.fields import MESSAGES
from slipstream.recent import Recent
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced, content
from slipstream.tokens import Tokens
from slipstream.types import IntArray

_PROBES = ('{"a": 1}', "Yes", "12", "\n", "- x")
"""Texts of which no two begin alike."""

_RECENT_PROMPTS = 64
"""Prompts that are kept for who asks again: for another answer, or after having appended to a session."""

_RECENT_TAILS = 256

_ENDING_TOKENS = 512
"""How much of an answer is looked for in a rendered conversation, from its end."""

LEDGER_TOKENS = 16 * 2**20
"""Token ids that the ledger keeps by default: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for its next assistant message."""

    tokens: Tokens
    conversation_id: str
    history: History
    parent: Digest | None = None
    """The conversation in the ledger that the prompt extends."""
    parent_length: int = 0
    """How many of the tokens are that conversation's."""
    opens_reasoning: bool = False
    """Whether the template already began the reasoning that the answer goes on with."""
    known: int = 0
    """How many messages there are up to the last answer in the ledger, that included."""
    known_length: int = 0
    """How many tokens the ledger has for those; the prompt has others if the template rewrote them."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the ledger knows of a conversation that was answered: its last part, and all of its tokens."""

    key: Digest
    entry: LedgerEntry
    tokens: Tokens


class Conversations:
    """Turns messages into prompts, and remembers which tokens each answer was made of.

    A client sends the whole conversation each time. Messages that were seen before keep the token ids that they had
    then, whatever the template or the tokenizer would make of them now; only what follows the last known answer is
    rendered and tokenised. Thread-safe.
    """

    def __init__(
        self,
        template: Template | None,
        tokenizer: Tokenizer,
        dialect: Dialect,
        *,
        ledger_tokens: int = LEDGER_TOKENS,
    ) -> None:
        self._template = template
        self._renderer = Renderer(template, dialect)
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._ledger = Ledger(ledger_tokens)
        self._lock = threading.Lock()
        self._recent: Recent[tuple[object, ...], Prompt] = Recent(_RECENT_PROMPTS)
        self._certain_tails: Recent[Digest, IntArray] = Recent(_RECENT_TAILS)
        self.recall: Callable[[Digest], Iterable[tuple[Digest, LedgerEntry]]] = lambda _: ()
        """Finds the parts of a conversation that the ledger has forgotten, parents before their children."""
        self.check_length: Callable[[int], None] = lambda _: None
        """Raises `ContextLengthError` for more characters than any prompt can have, before they are tokenised."""
        self.renders: Counter[str] = Counter()
        """Prompts by how they were made: `first` (nothing known), `spliced`, `full` (known, but the template moved
        something), `repeated` (just made before)."""

    def prompt(self, messages: Sequence[Message], setting: Setting = NO_SETTING, *, tenant: str = "") -> Prompt:
        """The prompt for the next answer. Tools are part of it whether they may be called or not.

        Raises `InvalidRequestError` if the model has no chat template or its template refuses the messages.
        """
        setting = self.relevant(setting)
        if not messages:
            raise InvalidRequestError(MESSAGES, " is empty: send at least one")
        history = self._history(messages, setting, tenant)
        known = self._last_known(history)
        # What was thought is no part of the history, since many clients don't send it back.
        thoughts = tuple([(at, message.thought) for at, message in enumerate(messages) if message.reasoning])
        key = history.key, thoughts, known[1].key if known is not None else None
        if (recent := self._recent.get(key)) is not None:
            self.renders["repeated"] += 1
            return recent
        prompt = self._made(messages, setting, history, known)
        with self._lock:
            self._recent[key] = prompt
        return prompt

    def beginning(self, messages: Sequence[Message], setting: Setting = NO_SETTING, *, tenant: str = "") -> Prompt:
        """As much of a prompt as is certain while no user has said anything; till then many templates refuse messages.

        Raises what `prompt` raises.
        """
        setting = self.relevant(setting)
        texts = [self._whole([*messages, Message("user", probe)], setting) for probe in _PROBES]
        tokens = Tokens(self._encode_after((), commonprefix(texts)))  # noqa: RUF071
        return Prompt(tokens, _new_id(), self._history(messages, setting, tenant))

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
        key = prompt.history.key_after(answer)
        with self._lock:
            tokens = prompt.tokens.extended(kept)
            added = tokens.ids[prompt.parent_length :].copy()
            self._ledger.add(key, LedgerEntry(prompt.parent, added, prompt.conversation_id, len(kept)), tokens)
            return self._part(key)

    def known(self, messages: Sequence[Message], setting: Setting = NO_SETTING, *, tenant: str = "") -> Part | None:
        """As much of a conversation as ends with an answer in the ledger."""
        known = self._last_known(self._history(messages, self.relevant(setting), tenant))
        return known[1] if known is not None else None

    def path(self, key: Digest) -> list[tuple[Digest, int]]:
        """The parts of a conversation in the ledger, from its start, and the tokens up to the end of each."""
        with self._lock:
            return self._ledger.path(key) if self._entry(key) is not None else []

    def lineage(self, key: Digest | None) -> Iterator[tuple[Digest, LedgerEntry]]:
        """The parts of a conversation in the ledger, the last one first."""
        while key is not None:
            with self._lock:
                entry = self._entry(key)
            if entry is None:
                return
            yield key, entry
            key = entry.parent

    def certain_tail(self, answer: Message, token_ids: IntArray, setting: Setting = NO_SETTING) -> IntArray:
        """The token ids that follow an answer like this one, whatever comes next, int32 [n].

        Found by rendering results, or questions, that have nothing in common; a guess that costs nothing if it's wrong.
        `token_ids` are the conversation's, up to the answer's end.
        """
        setting = self.relevant(setting)
        kind = digest(setting.canonical() + repr([call.name for call in answer.tool_calls]))
        if (known := self._certain_tails.get(kind)) is not None:
            return known
        role, call_id = ("tool", answer.tool_calls[0].id) if answer.tool_calls else ("user", None)
        generated = self._written(token_ids)
        tails = []
        for probe in _PROBES:
            messages = [Message("user", "?"), answer, Message(role, probe, tool_call_id=call_id)]
            with suppress(InvalidRequestError):
                tails.append(self._renderer.tail(messages, 1, generated, setting) or content(""))
        ids = Tokens(self._encode_after(token_ids, commonprefix(tails))).ids  # noqa: RUF071
        with self._lock:
            self._certain_tails[kind] = ids
        return ids

    def _made(
        self, messages: Sequence[Message], setting: Setting, history: History, known: tuple[int, Part] | None
    ) -> Prompt:
        """The prompt, rendered from what follows the last known answer."""
        number, part = known if known is not None else (-1, None)
        tail = None
        if part is not None:
            plain = messages[number].text and not messages[number].tool_calls  # which ends with its text
            generated = "" if plain else self._written(part.tokens.ids)
            tail = self._renderer.tail(messages, number, generated, setting)
        if part is None or tail is None:
            self.renders["first" if part is None else "full"] += 1
            text, parent = self._whole(messages, setting), None
            tokens = self._with_answers(text, messages, history)
        else:
            self.renders["spliced"] += 1
            self.check_length(len(tail))
            text, parent = tail, part.key
            ids = self._encode_after(part.tokens.ids, tail)
            with self._lock:
                tokens = part.tokens.extended(ids)
        opened = self._dialect.reasoning.opened_by(text)
        conversation_id, length = (part.entry.conversation_id, len(part.tokens)) if part else (_new_id(), 0)
        parent_length = length if parent is not None else 0
        return Prompt(tokens, conversation_id, history, parent, parent_length, opened, number + 1, length)

    def _whole(self, messages: Sequence[Message], setting: Setting) -> Traced:
        """A whole conversation, rendered, unless it's longer than any prompt can be."""
        text = self._renderer.whole(messages, setting)
        self.check_length(len(text))
        return text

    @staticmethod
    def _history(messages: Sequence[Message], setting: Setting, tenant: str) -> History:
        return History(digest(setting.canonical(), digest(tenant)), messages)

    def _last_known(self, history: History) -> tuple[int, Part] | None:
        """The last answer in the ledger: its message's number, and the conversation up to it."""
        with self._lock:
            return history.last_known(self._part)

    def _part(self, key: Digest) -> Part | None:
        entry = self._entry(key)
        return Part(key, entry, self._ledger.tokens(key)) if entry is not None else None

    def _entry(self, key: Digest) -> LedgerEntry | None:
        """What the ledger has under a key, or had. The lock is held."""
        if (entry := self._ledger.get(key)) is None:
            for each in self.recall(key):
                self._ledger.add(*each)
            entry = self._ledger.get(key)
        return entry

    def relevant(self, setting: Setting) -> Setting:
        """As much of a setting as the template has names for."""
        if self._template is None:
            advice = "this model has no chat template: send a plain prompt, or take a model that is made for chat"
            raise InvalidRequestError(advice, param=MESSAGES)
        return setting.known_to(self._template.variables)

    def _with_answers(self, text: Traced, messages: Sequence[Message], history: History) -> Tokens:
        """The tokens of a whole conversation, of known answers those that they were generated as.

        They need not be what tokenising an answer gives. One that the template tells otherwise is rendered like a
        stranger's.
        """
        placing, at = Placing(text, len(messages)), 0
        ids: list[int] = []
        for number, (message, key) in enumerate(zip(messages, history.keys(), strict=True)):
            with self._lock:
                entry = self._ledger.get(key)
            if entry is None:
                continue
            generated = self._tokenizer.decode(entry.answer, skip_special=False)
            end = placing.end_of(number, message, generated)
            start = end - len(generated) if end is not None else 0
            if end is not None and at <= start and str.__eq__(text[start:end], generated):
                ids += self._encode_after(ids, text[at:start])
                ids += map(int, entry.answer)
                at = end
        return Tokens(ids + self._encode_after(ids, text[at:]))

    def _encode_after(self, ids: Sequence[int] | IntArray, text: str) -> list[int]:
        """The tokens of text that goes on from others."""
        begins = len(ids) == 0 or self._tokenizer.begins_after(int(ids[-1]))
        return self._tokenizer.encode(text, begins=begins)

    def _written(self, token_ids: IntArray) -> str:
        """The last that a model wrote, control tokens and all."""
        return self._tokenizer.decode(token_ids[-_ENDING_TOKENS:].tolist(), skip_special=False)

    def _tokens_spelling(self, text: str, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens, or as many of them as spell the text."""
        for length in range(len(token_ids), -1, -1):
            decoded = self._tokenizer.decode(token_ids[:length], shown=self._dialect.token_ids)
            if decoded == text:
                return token_ids[:length]
            if len(decoded) < len(text):
                break
        return None


def _new_id() -> str:
    return f"conv_{secrets.token_hex(12)}"
