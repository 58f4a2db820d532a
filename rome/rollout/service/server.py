"""Runs the service on a port, and ends it gracefully: SIGTERM or SIGINT stop new requests, let running ones finish for
a while, then end their streams with an error event."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from types import FrameType

import uvicorn

from rome.rollout.service.app import ServiceConfig, make_app
from rome.rollout.service.chats import ChatFormat
from rome.rollout.service.scheduler import Scheduler
from rome.rollout.stream import StreamEngine

_LAST_WORDS_SECONDS = 5  # for clients to take the error that ends their stream


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, how many sequences may wait for a slot, and seconds that running ones get on shutdown."""

    host: str = "127.0.0.1"
    port: int = 8000
    queue_limit: int = 64
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: expected 0..65535, found {self.port}")
        if self.queue_limit < 0 or not self.drain_seconds >= 0:
            raise ValueError("queue_limit, drain_seconds: expected numbers of at least 0")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, drain_seconds: float) -> None:
        super().__init__(config)
        self._scheduler, self._drain_seconds = scheduler, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one ends what runs at once."""
        self._scheduler.drain(0 if self.should_exit else self._drain_seconds)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                print(f"listening on http://{host}:{port}", flush=True)


def serve(engine: StreamEngine, chat: ChatFormat, service: ServiceConfig, server: ServerConfig) -> None:
    """Serves until a signal ends it. Call it in the main thread.

    Port 0 takes a free port; the address is printed once requests are taken.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when all is done: that is a clean end
        signal.signal(number, lambda *_: sys.exit(0))
    scheduler = Scheduler(engine, server.queue_limit)
    try:
        config = uvicorn.Config(
            make_app(scheduler, chat, service),
            host=server.host,
            port=server.port,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=int(server.drain_seconds) + _LAST_WORDS_SECONDS,
        )
        _Server(config, scheduler, server.drain_seconds).run()
    finally:
        scheduler.close()
