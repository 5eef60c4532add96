"""The host's time for a turn of a conversation, by its length: from the request to the first step, and to the commit.

    python -m slipstream_bench.measurements.turn_host_time

A coding agent's conversation (a question, then calls and results of some 500 tokens together) grows to each length over
an engine whose backend computes nothing, with the default model's tokenizer and template and a database on disk. Then
some turns are timed: from the validated request to the first step, from the answer's last token to the commit, and an
`append` to the session. Reading the messages, whose digests cost what the client sends, is timed apart, for 100 kB.
Times are wall time; other work on the machine adds to them.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from slipstream.backend import Chunk
from slipstream.chat import Message, Setting, Tool, ToolUse
from slipstream.config import EngineConfig
from slipstream.engine import SamplingParams
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.runtime import BACKENDS, Runtime
from slipstream.sampling import Choice, Row
from slipstream.turns import TurnRequest
from slipstream_bench.measurements.engine_overhead import Stub, StubTicket
from slipstream_bench.measurements.turn_costs import words

PAIR_TOKENS = 500
READ = Tool("read", "Read a file", {"type": "object", "properties": {"path": {"type": "string"}}})
SETTING = Setting(ToolUse((READ,)))
PARAMS = SamplingParams(temperature=0, max_tokens=24)
PLACES = ("first step", "commit", "append", "read 100 kB")


class TimedStub(Stub):
    """A backend that computes nothing, and notes when it was asked."""

    first_launch: float | None = None
    last_choice = 0.0

    def launch(self, chunks: Sequence[Chunk]) -> "TimedTicket":
        """Start a step."""
        self.first_launch = self.first_launch or time.perf_counter()
        return TimedTicket(self, chunks)


class TimedTicket(StubTicket):
    """A step that is done at once."""

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Choose the likely tokens."""
        assert isinstance(self.backend, TimedStub)
        self.backend.last_choice = time.perf_counter()
        return super().choose(rows)


class Agent:
    """A conversation that is answered turn by turn, and what its turns took, in seconds."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.stub = TimedStub(model.manifest.vocab_size, chooses=True, num_blocks=2**14)
        BACKENDS["openvino"] = lambda _model, _config: lambda _progress: self.stub
        config = EngineConfig.model_validate({"state_dir": folder, "response_cache_memory": 0})
        manifest = model.manifest.model_copy(update={"context_length": 2**18})
        self.runtime = Runtime(replace(model, manifest=manifest), config)
        self.messages: list[Message] = [Message("system", "You write code."), Message("user", "Mend the test.")]
        self.times: dict[str, list[float]] = defaultdict(list)
        self.tokens = 0
        self._rng = random.Random(0)

    def turn(self) -> None:
        """Send the whole conversation in new messages, as a client does, and take the answer."""
        started = time.perf_counter()
        messages = read(self.messages)
        size = sum(len(message.text) for message in messages)
        self.times["read 100 kB"].append((time.perf_counter() - started) * 1e5 / size)
        request = TurnRequest(
            prompt=tuple(messages), params=PARAMS, setting=SETTING, session_id="agent", continues=False
        )
        self.stub.first_launch = None
        started = time.perf_counter()
        for piece in self.runtime.turns.stream(request):
            last = piece
        assert self.stub.first_launch is not None
        self.times["first step"].append(self.stub.first_launch - started)
        self.times["commit"].append(time.perf_counter() - self.stub.last_choice)
        self.tokens = last.choice.counters.prompt_tokens
        self._wait()
        self.messages += [last.choice.reader.message, self._result()]

    def append(self) -> None:
        """Append to a session without an answer, and take it back."""
        sessions = self.runtime.sessions
        started = time.perf_counter()
        sessions.append("", "agent", [self._result()])
        self.times["append"].append(time.perf_counter() - started)
        sessions.rollback("", "agent", keep=len(self.messages) - 1)
        self._wait()

    def _wait(self) -> None:
        """Until nothing is computed ahead any more."""
        while self.runtime.sessions.ahead.waiting or self.runtime.core.stats().running:
            time.sleep(0.001)

    def _result(self) -> Message:
        return Message("user", words(self._rng, PAIR_TOKENS - 24))


def read(messages: Sequence[Message]) -> list[Message]:
    """The messages as a client sends them again: equal and new, each with its digest."""
    again = [replace(message) for message in messages]
    for message in again:
        assert message.digest
    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_000, 20_000, 150_000])
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    console = Console()
    table = Table("tokens", *(f"{place}, ms" for place in PLACES))
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        agent = Agent(ModelStore().ensure(DEFAULT_MODEL), Path(folder))
        task = progress.add_task("Growing", total=max(options.tokens))
        for tokens in sorted(options.tokens):
            while agent.tokens < tokens:
                agent.turn()
                progress.update(task, completed=agent.tokens)
            agent.times.clear()
            for _ in range(options.turns):
                agent.turn()
                agent.append()
            medians = [statistics.median(agent.times[place]) * 1e3 for place in PLACES]
            table.add_row(f"{agent.tokens:,}", *(f"{each:.2f}" for each in medians))
        agent.runtime.close()
    console.print(table)


if __name__ == "__main__":
    main()
