"""Sampled tokens as text while they come: UTF-8 across tokens, and stop strings.

Tokens are never touched. A stop string cuts the *text* before it; the tokens up to and including the one that completed
it are what was sampled, and what a trainer gets.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Text of one request.

    Args:
      piece: bytes of a token; b"" for one that has no text.
      stops: strings that end the request. The text before the first of them is kept, they are not.
    """

    def __init__(self, piece: Callable[[int], bytes], stops: Sequence[str] = ()) -> None:
        self._piece, self._stops = piece, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token. Sets `stopped` if the token completed a stop string."""
        self._held += self._decoder.decode(self._piece(int(token)))
        return self._take()

    def finish(self) -> str:
        """What was held back, once there are no more tokens. An incomplete character gives U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        text = self._take()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _take(self) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        certain = len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that `marker`, not whole, starts with."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if marker.startswith(text[-size:])), 0)
