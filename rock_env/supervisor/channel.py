"""Frames (rock_env.wire) over two descriptors, as a loop sees them."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from rock_env import wire
from rock_env.supervisor.loop import Loop


class Channel:
    """Frames over two descriptors, as a loop sees them."""

    def __init__(self, loop: Loop, incoming: int, outgoing: int) -> None:
        self._loop = loop
        self._in, self._out = incoming, outgoing
        self._reader = wire.FrameReader()
        self._pending = bytearray()
        self.on_frame: Callable[[dict, bytes], None] = lambda header, blob: None
        self.on_end: Callable[[], None] = lambda: None
        for fd in (incoming, outgoing):
            os.set_blocking(fd, False)
        loop.add_reader(incoming, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._in, 1 << 20)
        except BlockingIOError:
            return
        except OSError:  # a socket whose other end was killed
            data = b""
        if not data:
            self.on_end()
            return
        self._reader.feed(data)
        while (frame := self._reader.next()) is not None:
            self.on_frame(*frame)

    def send(self, header: dict, blob: bytes = b"") -> None:
        """Send a frame as soon as the other side takes it."""
        was_idle = not self._pending
        self._pending += wire.encode(header, blob)
        if was_idle:
            self._write()
            if self._pending:
                self._loop.add_writer(self._out, self._write)

    def _write(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._out, self._pending[: 1 << 16])]
        except BlockingIOError:
            return
        except OSError:
            self.on_end()
        self._loop.remove_writer(self._out)

    def flush(self, seconds: float, most: int = 0) -> bool:
        """Send until `most` bytes are left, at most for so long; the loop stands still. False if more are left."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._out, select.POLLOUT)
        while len(self._pending) > most and time.monotonic() < deadline:
            poll.poll(100)
            self._write()
        return len(self._pending) <= most

    def record(self, event: str, **fields: object) -> None:
        """A record for the audit log (rock_env.supervisor.journal.Recorder), which the other side writes."""
        self.send({"audit": event, "fields": fields})
