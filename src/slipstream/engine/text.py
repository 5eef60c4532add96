"""From generated tokens to text that may be shown."""

from collections.abc import Sequence

from slipstream.tokenizer import IncrementalDecoder


class TextStream:
    """Decodes tokens one at a time and watches for stop strings.

    Text that could turn out to be the beginning of a stop string, or of a character, is held back until it's certain.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stop = stop
        self.watchful = bool(stop)
        """Whether there are stop strings, so that each token has to be fed alone."""
        self._held = ""
        self.stop_string: str | None = None
        """The one that was completed."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed; nothing follows it."""
        return self.stop_string is not None

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain; sets `stopped` if they complete a stop string, which is left out."""
        return self._scan(self._decoder.feed(tokens))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        certain = self._scan(self._decoder.flush())
        held, self._held = self._held, ""
        return certain + ("" if self.stopped else held)

    def _scan(self, text: str) -> str:
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop_string = min(found)
            return self._held[:at]
        certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))
