"""How many forward passes real calls need: the true calls of the leaderboard, played through grammar and drafting.

    python -m slipstream_bench.measurements.replay_calls

A perfect model stands in for the real one: at each place it picks the next token of the true call. What is counted is
Slipstream's own code: forced tokens, drafts, their verification. The prompt holds the tools, the user's turns and
earlier calls. Two caps on the draft show what a longer one brings.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from slipstream.backend import SequenceState
from slipstream.chat import ChatTemplate, Message, ToolCall, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.engine.drafting import Draft, Drafter
from slipstream.engine.grammar import Constraint, GrammarCompiler
from slipstream.kv import Sequence
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.sampling.sampler import masked
from slipstream.tokenizer import Tokenizer
from slipstream_bench import bfcl

DIALECT = Dialect("")


@dataclass(frozen=True)
class Way:
    """A way to decode."""

    name: str
    forced: bool
    draft: int
    pool: bool = True


WAYS = (
    Way("one token a pass", forced=False, draft=0),
    Way("forced tokens", forced=True, draft=0),
    Way("drafts of 16", forced=False, draft=16),
    Way("forced, drafts of 8", forced=True, draft=8),
    Way("forced, drafts of 16", forced=True, draft=16),
    Way("forced, drafts of 32", forced=True, draft=32),
    Way("forced, drafts of 16, no recent calls", forced=True, draft=16, pool=False),
)


class PerfectModel:
    """Picks the next token of a text that it knows, as the grammar lets it spell it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._logits = np.zeros(vocab_size, np.float32)

    def choose(self, constraint: Constraint, rest: str) -> int:
        """The token: the tokenizer's own first choice for the rest of the text, else the longest one allowed."""
        first = self._tokenizer.encode(rest)[0]
        allowed = masked(self._logits, constraint.mask()) == 0
        if allowed[first]:
            return first
        fitting = [
            id for id in np.flatnonzero(allowed).tolist() if rest.encode().startswith(self._tokenizer.token_bytes(id))
        ]
        return max(fitting, key=lambda id: len(self._tokenizer.token_bytes(id)))


class _Uncomputed(SequenceState):
    """Of a sequence of which nothing is ever computed."""

    def __init__(self) -> None:
        self.length = 0


class Player:
    """Plays conversations one way, and counts."""

    def __init__(self, way: Way, tokenizer: Tokenizer, compiler: GrammarCompiler, model: PerfectModel) -> None:
        self.tokens = self.passes = self.calls = 0
        self.unfit: list[str] = []
        """True calls that do not fit their own schema, and so can't be played."""
        self._way = way
        self._tokenizer = tokenizer
        self._compiler = compiler
        self._model = model
        self._drafter = Drafter()

    def play(self, conversation: bfcl.Conversation, template: ChatTemplate) -> None:
        """All calls of a conversation, each after what came before it."""
        use = ToolUse(tuple(conversation.tools), "required", parallel=False)
        written = DIALECT.grammar(use, None, opens_reasoning=False)
        assert written is not None
        grammar = self._compiler.compile(written.source, param="tools")
        messages: list[Message] = []
        for question, calls in conversation.turns:
            messages.append(Message("user", question))
            for name, arguments in calls:
                text = template.render(DIALECT.tool_format.messages(messages, use))
                call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
                spelled = f"<tool_call>\n{call}\n</tool_call>"
                ids = self._tokenizer.encode(spelled)
                if grammar.constraint().valid_prefix(ids) == len(ids):
                    self._call(Sequence(_Uncomputed(), self._tokenizer.encode(text)), grammar.constraint(), spelled)
                else:
                    self.unfit.append(f"{conversation.id}: {call}")
                messages.append(Message("assistant", tool_calls=(ToolCall("", name, json.dumps(arguments)),)))
                messages.append(Message("tool", "done"))

    def _call(self, sequence: Sequence, constraint: Constraint, rest: str) -> None:
        """Decode one call, pass by pass, as `ActiveRequest.accept` does."""
        prompt = len(sequence)

        def push(tokens: Iterable[int]) -> None:
            nonlocal rest
            for token in tokens:
                sequence.append(token)
                constraint.accept((token,))
                spelled = self._tokenizer.token_bytes(token).decode()
                assert rest.startswith(spelled), (rest, spelled)
                rest = rest[len(spelled) :]

        if self._way.forced:
            push(constraint.forced())
        while not constraint.finished:
            draft = Draft()
            if self._way.draft:
                draft = self._drafter.propose(sequence, constraint, "", forced=self._way.forced).cut(self._way.draft)
            self.passes += 1
            start, confirmed, chosen = len(sequence), 0, []
            while not constraint.finished and confirmed == len(sequence) - start:
                chosen.append(len(sequence))
                push((self._model.choose(constraint, rest),))
                if self._way.forced:
                    push(constraint.forced())
                new = sequence.tokens[start:].tolist()
                while confirmed < min(len(draft), len(new)) and draft.tokens[confirmed] == new[confirmed]:
                    confirmed += 1
            self._drafter.learn(sequence, "", start, chosen)
        self.tokens += len(sequence) - prompt
        self.calls += 1
        if self._way.pool:
            self._drafter.remember(sequence.tokens[prompt:].copy(), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200)
    options = parser.parse_args()
    stored = ModelStore().ensure(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(stored.tokenizer_path)
    template = ChatTemplate(stored.chat_template or "", {})
    vocab_size = stored.manifest.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab_size=vocab_size, stop_token_ids=stored.manifest.stop_token_ids)
    chosen = list(bfcl.conversations())[: options.conversations]
    console = Console(width=120)
    table = Table("", "calls", "tokens", "forward passes", "passes per token", "passes per call")
    for way in WAYS:
        player = Player(way, tokenizer, compiler, PerfectModel(tokenizer, vocab_size))
        for conversation in track(chosen, f"{way.name:40}", console=console):
            player.play(conversation, template)
        per_token, per_call = player.passes / player.tokens, player.passes / player.calls
        table.add_row(
            way.name,
            *(str(count) for count in (player.calls, player.tokens, player.passes)),
            f"{per_token:.3f}",
            f"{per_call:.1f}",
        )
    console.print(table)
    for call in player.unfit:
        console.print("does not fit its own schema, left out:", call, highlight=False, markup=False)


if __name__ == "__main__":
    main()
