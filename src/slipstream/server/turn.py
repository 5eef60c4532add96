"""Turns on the event loop: started and recorded on other threads, their pieces read as they come."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from fastapi import Request

from slipstream.config import ServerConfig
from slipstream.engine import Output
from slipstream.errors import LimitError
from slipstream.fields import CHOICES, Option
from slipstream.runtime import Runtime
from slipstream.server.access import client_of
from slipstream.server.keys import Client
from slipstream.server.metrics import Metrics
from slipstream.server.served_names import ServedNames
from slipstream.turns import Choice, Piece, Turn, TurnRequest

_SWITCHES = ("reuse", "jump_forward", "speculation", "response_cache")


class LiveTurn:
    """Answers under way. Belongs to the event loop that it was made on; `cancel` it when nobody waits for them."""

    def __init__(self, runner: "TurnRunner", http: Request) -> None:
        self.id = f"turn_{secrets.token_hex(8)}"
        """What the log calls it."""
        self.tenant = client_of(http).tenant
        self.headers = http.headers
        """Of its request, by names in lower case."""
        self.first_token_seconds = 0.0
        """From its start to the first piece of any answer."""
        self.runner = runner
        self._ended = 0
        self._loop = asyncio.get_running_loop()
        self._started = time.perf_counter()
        self._arrived: list[tuple[Choice, Output]] = []
        self._wake = asyncio.Event()
        self._over = False
        self._turn: Turn

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.perf_counter() - self._started

    @property
    def choices(self) -> list[Choice]:
        """In the order of the requests, those of one request together."""
        return self._turn.choices

    async def start(self, make: Callable[[], Sequence[TurnRequest]]) -> None:
        """Make requests, their prompts and grammars, off the event loop, and submit them all, or none."""
        self._turn = await asyncio.to_thread(lambda: self.runner.runtime.turns.start(make(), self._notify))

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces of all answers as they come, those that came together in one list.

        The list is empty every `keep_alive_seconds`, so that a stream can show that it's alive. By the time an answer's
        last piece is seen, the conversation's next turn will find it. Raises the error that ended a request; whatever
        ends the iteration, what is unfinished then is cancelled.
        """
        tick = self._tick()
        try:
            while self._turn.unread:
                await self._wake.wait()
                self._wake.clear()
                arrived, self._arrived = self._arrived, []
                if tick.when() <= self._loop.time():
                    tick = self._tick()
                    yield []
                if any(output.finish_reason is not None for _, output in arrived):
                    yield await self._loop.run_in_executor(self.runner.endings, self._read, arrived)
                elif arrived:
                    yield self._read(arrived)
            self._over = True
        finally:
            tick.cancel()
            self.cancel()
            self._note_end()

    def cancel(self) -> None:
        """Stop what is unfinished, soon; harmless when nothing is."""
        if not self._over:
            self._over = True
            self._loop.run_in_executor(self.runner.endings, self._turn.cancel)  # whose session may just be written

    def _tick(self) -> asyncio.TimerHandle:
        """Wake the reader in a while, though nothing came."""
        return self._loop.call_later(self.runner.config.keep_alive_seconds, self._wake.set)

    def _read(self, arrived: Sequence[tuple[Choice, Output]]) -> list[Piece]:
        return [self._turn.read(*each) for each in arrived]

    def _notify(self, choice: Choice, output: Output) -> None:  # on the engine's thread
        self._loop.call_soon_threadsafe(self._deliver, choice, output)

    def _deliver(self, choice: Choice, output: Output) -> None:
        """Take a piece from the engine, also when nobody reads any more, for the metrics."""
        if output is choice.outputs[0]:
            self.first_token_seconds = self.first_token_seconds or self.seconds
            self.runner.metrics.first_piece(self.seconds)
        if output.finish_reason is not None:
            self.runner.metrics.finished(output.finish_reason, choice.counters, self.seconds)
            self._ended += 1
            self._note_end()
        self._arrived.append((choice, output))
        self._wake.set()

    def _note_end(self) -> None:
        """Tell once that it's over: when all was read, or nobody reads any more and the engine let go of it."""
        if self._over and self._ended == len(self.choices):
            self._ended = -1
            for observe in self.runner.observers:
                observe(self)


class TurnRunner:
    """Starts turns for clients. What the configuration switches off, no turn gets, whatever it asks for.

    `observers` are called with each turn that is over.
    """

    def __init__(
        self, runtime: Runtime, metrics: Metrics, config: ServerConfig, observers: Sequence[Callable[[LiveTurn], None]]
    ) -> None:
        self.runtime = runtime
        self.metrics = metrics
        self.config = config
        self.observers = observers
        self.names = ServedNames(runtime.model.name, config.served_model_name)
        self.endings = ThreadPoolExecutor(1, "slipstream-endings")  # so that none waits for others' prompts

    async def start(self, make: Callable[[], Sequence[TurnRequest]], http: Request) -> LiveTurn:
        """Start a turn of all the requests that `make` makes, or of none, for the client who sent them.

        `make` is called on another thread.

        Raises `InvalidRequestError`, `SessionConflictError`, `OverloadedError` and `EngineStoppedError`.
        """
        turn = LiveTurn(self, http)
        await turn.start(lambda: self._allowed(make(), client_of(http)))
        return turn

    def _allowed(self, requests: Sequence[TurnRequest], client: Client) -> list[TurnRequest]:
        """The client's requests without what is switched off; raises `LimitError` if they are for too many answers."""
        asked, most = sum(request.choices for request in requests), self.config.limits.max_choices
        if asked > most:
            raise LimitError(CHOICES, asked, "choices (prompts times n)", Option("max_choices"), most)
        return [
            replace(
                request,
                tenant=client.tenant,
                weight=client.weight,
                **{name: getattr(request, name) and getattr(self.config, name) for name in _SWITCHES},
            )
            for request in requests
        ]
