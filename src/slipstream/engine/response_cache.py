"""Answers to exact repeats, from memory: a deterministic request has one answer, so it is computed once."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from slipstream.engine.request import EngineRequest, Output, TurnCounters

Key = bytes

_ENTRY_BYTES = 500
"""What an entry takes besides its tokens and text: objects, the key, the place in the table."""
_TOKEN_BYTES = 36
_LOGPROB_BYTES = 200


class ResponseCache:
    """Finished answers by everything that decides them; bounded in bytes, least recently used out first.

    What a request may take from it follows from the promise of exactness: what was cached, drafted or forced changes no
    token, so those switches are not part of the key. `fingerprint` stands for the model. Thread-safe.
    """

    def __init__(self, max_bytes: int, fingerprint: str) -> None:
        self._max_bytes = max_bytes
        self._fingerprint = fingerprint
        self._entries: OrderedDict[Key, Output] = OrderedDict()
        self._lock = threading.Lock()
        self.total_bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, request: EngineRequest) -> Key | None:
        """Stands for all that can change the answer; None if it has more than one, or must not come from memory."""
        params = request.params
        deterministic = params.greedy or params.seed is not None
        if not (deterministic and request.response_cache and request.reuse and self._max_bytes):
            return None
        decisive = replace(
            params,
            seed=None if params.greedy else params.seed,
            logit_bias=dict(sorted(params.logit_bias.items())),
        )
        grammar = request.grammar.source if request.grammar is not None else None
        text = repr((self._fingerprint, request.tenant, decisive, grammar, len(request.prompt)))
        return hashlib.blake2b(text.encode() + request.prompt.tobytes(), digest_size=32).digest()

    def get(self, key: Key, prompt_tokens: int) -> Output | None:
        """The whole answer in one piece, at no cost, if it is known; counts as a use."""
        with self._lock:
            if (answer := self._entries.get(key)) is None:
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
        counters = TurnCounters(
            prompt_tokens=prompt_tokens,
            reused_tokens=prompt_tokens,
            completion_tokens=len(answer.token_ids),
            response_cache="hit",
        )
        return replace(answer, counters=counters)

    def recording(self, key: Key, sink: Callable[[Output], None]) -> Callable[[Output], None]:
        """A sink that passes everything on to `sink`, and keeps the answer when it has come to its own end."""
        pieces: list[Output] = []

        def record(output: Output) -> None:
            pieces.append(output)
            if output.finish_reason in ("stop", "length"):
                self._put(key, pieces)
            sink(output)

        return record

    def _put(self, key: Key, pieces: list[Output]) -> None:
        whole = Output(
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
            finish_reason=pieces[-1].finish_reason,
            stop_string=pieces[-1].stop_string,
        )
        size = _size(whole)
        with self._lock:
            if key in self._entries or size > self._max_bytes:
                return
            self._entries[key] = whole
            self.total_bytes += size
            while self.total_bytes > self._max_bytes:
                self.total_bytes -= _size(self._entries.popitem(last=False)[1])


def _size(answer: Output) -> int:
    """The bytes that an answer takes, about."""
    alternatives = sum(1 + len(logprob.top) for logprob in answer.logprobs)
    return _ENTRY_BYTES + 4 * len(answer.text) + _TOKEN_BYTES * len(answer.token_ids) + _LOGPROB_BYTES * alternatives
