"""What a turn costs between its answer's last token and its commit, by how long the conversation is.

    python -m slipstream_bench.measurements.commit_costs

A coding agent's conversation (a question, then calls and results of some 500 tokens together) goes through the sessions
of an engine that computes nothing, with the default model's tokenizer and template, and a database on disk. Each column
is a median over turns at that length: `prepare` before the answer; then `record` (the ledger in memory) and `commit`
(all else until the session is on disk); and `append` of a result to the session, without making its prompt. `bytes` is
what a turn adds to the database's log.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from tests.unit.toy_backend import ToyBackend

from slipstream.chat import ChatTemplate, Conversations, Message, Prompt, Setting, Tool, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.messages import ToolCall
from slipstream.engine import EngineCore, TurnCounters
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.sessions import Database, Sessions
from slipstream.tokenizer import Tokenizer

COLUMNS = ("prepare", "record", "commit", "append")
RESULT = "The file has a function that reads a line, another that writes one, and a test for each of the two. " * 20
READ = Tool("read", "Reads a file.", {"type": "object", "properties": {"path": {"type": "string"}}})
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_000, 20_000, 150_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = Table("tokens", "messages", *(f"{name} ms" for name in COLUMNS), "bytes")
    with tempfile.TemporaryDirectory() as folder:
        agent = _Agent(Path(folder))
        for tokens in options.tokens:
            while agent.tokens < tokens - 300 * options.rounds:
                agent.turn()
            agent.times.clear()
            for _ in range(options.rounds):
                agent.turn()
                agent.append()
            medians = {name: statistics.median(times) for name, times in agent.times.items()}
            cells = [f"{medians[name] * 1e3:.2f}" for name in COLUMNS]
            size = f"{medians['tokens']:,.0f}", f"{medians['messages']:,.0f}"
            table.add_row(*size, *cells, f"{medians['bytes']:,.0f}")
        agent.close()
    Console(width=120).print(table)


class _Agent:
    """One conversation, whose client sends all of it each time."""

    def __init__(self, folder: Path) -> None:
        model = ModelStore().ensure(DEFAULT_MODEL)
        self._tokenizer = Tokenizer.from_file(model.tokenizer_path)
        template = ChatTemplate(model.chat_template or "", {"bos_token": "", "eos_token": ""})
        self._conversations = Conversations(template, self._tokenizer, Dialect(template.shown, self._tokenizer))
        core = EngineCore(
            ToyBackend(num_blocks=2**18), self._tokenizer, context_length=2**20, stop_token_ids=frozenset()
        )
        self._core = core
        self._log = folder / "state.db-wal"
        self._database = Database(folder / "state.db", model.fingerprint)
        self._sessions = Sessions(core, self._conversations, ttl=1e6, database=self._database)
        self._setting = Setting(ToolUse((READ,)))
        core.prefill = lambda job: None  # type: ignore[method-assign]  # noqa: ARG005
        self.messages: list[Message] = [Message("system", "You write code."), Message("user", "Mend the test.")]
        self.tokens = 0
        self.times: dict[str, list[float]] = defaultdict(list)
        """What was measured since it was cleared, times in seconds."""

    def turn(self) -> None:
        """A call, and its result."""
        asked = [Message(m.role, m.text, m.tool_calls, m.tool_call_id) for m in self.messages]  # as a client sends it
        number = len(asked)
        arguments = f'{{"path": "src/file_{number}.py"}}'
        text = f'<tool_call>\n{{"name": "read", "arguments": {arguments}}}\n</tool_call>'
        answer = Message("assistant", tool_calls=(ToolCall(f"call_{number}", "read", arguments),))
        turns = self._sessions.turns
        turn = turns.begin("", "agent", asked, self._setting, continues=False)
        prompt = self._conversations.prompt(turn.messages, turn.setting)
        self._timed("prepare", lambda: turns.prepare(turn, prompt, reuse=True))
        ids = self._tokenizer.encode(text)
        before = self._log.stat().st_size
        record = self._conversations.record
        self._conversations.record = lambda *each: self._timed("record", lambda: record(*each))  # type: ignore[method-assign]
        self._timed("commit", lambda: turns.answered(turn, prompt, answer, ids, text, TurnCounters()))
        self._conversations.record = record  # type: ignore[method-assign]
        self.times["commit"][-1] -= self.times["record"][-1]
        self.times["bytes"].append(self._log.stat().st_size - before)
        self.times["tokens"].append(len(prompt.token_ids))
        self.times["messages"].append(number)
        self.messages += [answer, Message("tool", f"{number}: {RESULT}", tool_call_id=f"call_{number}")]
        self.tokens = len(prompt.token_ids)

    def append(self) -> None:
        """The result is appended to the session, and taken back."""
        prompts, prompt = list[float](), self._conversations.prompt

        def timed(*messages: Any, **rest: Any) -> Prompt:
            started = time.perf_counter()
            made = prompt(*messages, **rest)
            prompts.append(time.perf_counter() - started)
            return made

        self._conversations.prompt = timed  # type: ignore[method-assign]
        self._timed("append", lambda: self._sessions.append("", "agent", self.messages[-1:]))
        self._conversations.prompt = prompt  # type: ignore[method-assign]
        self.times["append"][-1] -= sum(prompts)
        self._sessions.rollback("", "agent", keep=len(self.messages) - 1)

    def close(self) -> None:
        self._core.shutdown()
        self._sessions.close()
        self._database.close()

    def _timed(self, name: str, action: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return action()
        finally:
            self.times[name].append(time.perf_counter() - started)


if __name__ == "__main__":
    main()
