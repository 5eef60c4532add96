"""From a list of messages to the token ids of a prompt, exact down to what the model generated before."""

import re
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.chat.formats import ToolFormat
from slipstream.chat.ledger import Ledger, LedgerEntry
from slipstream.chat.messages import Digest, Message, digest, digests
from slipstream.chat.template import ChatTemplate
from slipstream.chat.tools import NO_TOOLS, ToolUse
from slipstream.errors import InvalidRequestError
from slipstream.tokenizer import Tokenizer

_MARK = re.compile("slipstream[0-9a-f]{32}")

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
        tool_format: ToolFormat,
        *,
        ledger_tokens: int = LEDGER_TOKENS,
    ) -> None:
        self._template = template
        self._tool_format = tool_format
        self._tokenizer = tokenizer
        self._ledger = Ledger(ledger_tokens)
        self._lock = threading.Lock()
        self.renders: Counter[str] = Counter()
        """Prompts by how they were made: `first` (nothing known), `spliced`, `full` (known, but template refused)."""

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
        chain = digests(digest(digest(b"", tenant), use.canonical()), messages)
        known = self._known(chain)
        if known is not None:
            index, entry, tokens = known
            tail = self._tail(messages, use, index)
            if tail is not None:
                self.renders["spliced"] += 1
                ids = np.concatenate((tokens, np.asarray(self._tokenizer.encode(tail), np.int32)))
                opened = _opens_reasoning(tail)
                return Prompt(ids, entry.conversation_id, chain[-1], chain[index], len(tokens), opened)
        self.renders["full" if known else "first"] += 1
        text = self._render(messages, use)
        ids = np.asarray(self._tokenizer.encode(text), np.int32)
        conversation_id = known[1].conversation_id if known else f"conv_{secrets.token_hex(12)}"
        return Prompt(ids, conversation_id, chain[-1], None, 0, _opens_reasoning(text))

    def record(self, prompt: Prompt, answer: Message, token_ids: Sequence[int], text: str) -> None:
        """Remember that `answer` was generated after `prompt` as these token ids (without the stop token).

        `text` is what was generated and shown, before calls and reasoning were taken out of it. Where a stop string
        cut it short, the tokens are cut to match; if no token ends there, the answer can't be told in whole tokens and
        is left to be rendered like a stranger's.
        """
        kept = self._tokens_spelling(text, token_ids)
        if kept is None:
            return
        ids = np.concatenate((prompt.token_ids[prompt.parent_length :], np.asarray(kept, np.int32)))
        with self._lock:
            key = digest(prompt.key, answer.canonical())
            self._ledger.add(key, LedgerEntry(prompt.parent, ids, prompt.conversation_id))

    def _known(self, chain: list[Digest]) -> tuple[int, LedgerEntry, IntArray] | None:
        """The last message that ends a known conversation: its index, entry, and all tokens up to it."""
        with self._lock:
            for index in range(len(chain) - 1, -1, -1):
                if (entry := self._ledger.get(chain[index])) is not None:
                    return index, entry, self._ledger.tokens(chain[index])
        return None

    def _render(self, messages: Sequence[Message], use: ToolUse) -> str:
        assert self._template is not None
        return self._template.render(self._tool_format.messages(messages, use), self._tool_format.template_tools(use))

    def _tail(self, messages: Sequence[Message], use: ToolUse, index: int) -> str | None:
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
        _, found, after = text.partition(marks[index])
        return after if found and order == expected else None

    def _tokens_spelling(self, text: str, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens, or as many of them as spell the text."""
        for skip_special in (True, False):
            for length in range(len(token_ids), -1, -1):
                decoded = self._tokenizer.decode(token_ids[:length], skip_special=skip_special)
                if decoded == text:
                    return token_ids[:length]
                if len(decoded) < len(text):
                    break
        return None


def _opens_reasoning(text: str) -> bool:
    return text.rstrip().endswith("<think>")
