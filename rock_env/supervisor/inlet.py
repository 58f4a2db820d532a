"""Bytes on their way to a program inside a sandbox: numbered, so that a request may be repeated, and bounded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rock_env.supervisor.faults import Fault
from rock_env.supervisor.loop import Event

if TYPE_CHECKING:
    from rock_env.supervisor.commands import Runner


class Inlet:
    """Takes bytes as far as there is room for what was not passed on yet; a subclass passes them on.

    `_changed` is set, and replaced, whenever something happens that somebody may wait for.
    """

    _most_pending: int

    def __init__(self, box: Runner) -> None:
        self._box = box
        self._loop = box.loop
        self._pending, self._accepted = bytearray(), 0  # what is to be passed on, and how much was ever taken
        self._input_ends = False
        self._changed = Event(box.loop)

    def _wake(self) -> None:
        changed, self._changed = self._changed, Event(self._loop)
        changed.set()

    def _require_reader(self) -> None:
        """Raises Fault when nobody reads any more."""
        raise NotImplementedError(f"{type(self).__name__}._require_reader")

    def _feed(self) -> None:
        """Pass on what is pending, without waiting; `_on_writable` goes on."""
        raise NotImplementedError(f"{type(self).__name__}._feed")

    def _on_writable(self) -> None:
        self._feed()
        self._wake()

    async def _accept(self, data: bytes, at: int, seconds: float) -> bool:
        """Whether all of `data` was taken, within `seconds`.

        `at`: how many bytes were sent before; what of `data` has arrived already is not taken again.
        """
        if not 0 <= at <= self._accepted:
            raise Fault("spec", f"at: expected at most {self._accepted}, which is all that has arrived, got {at}")
        rest = memoryview(data)[self._accepted - at :]
        deadline = time.monotonic() + seconds
        while rest:
            self._require_reader()
            room = self._most_pending - len(self._pending)
            if room > 0:
                self._pending += rest[:room]
                self._accepted += min(room, len(rest))
                rest = rest[room:]
                self._feed()
            elif not await self._changed.wait(deadline):
                break
            self._box.require_alive()
        return not rest
