"""What runs inside the processes beside the supervisor (egress proxy, model endpoints; see helpers.py for outside)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rock_env.supervisor import linux, seccomp


def run(name: str, uid: int, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `main()` as `uid` (0: who it is already) without privileges. Everything it needs must be loaded already."""
    last_capability = linux.last_capability()
    linux.set_name(name)
    with asyncio.Runner() as runner:
        runner.get_loop()
        linux.empty_bounding_set(last_capability)
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        linux.die_with_parent()
        linux.drop_privileges(seccomp.build(linux.MACHINE), False, None)
        runner.run(main())


class TokenBucket:
    """At most `burst` turns at once, and `per_second` in the long run. Who waits looks every `pause` seconds."""

    def __init__(self, burst: int, per_second: float, pause: float) -> None:
        self._burst, self._per_second, self._pause = burst, per_second, pause
        self._tokens, self._refilled = float(burst), time.monotonic()

    async def take(self) -> None:
        """Wait for a turn, and use it up."""
        while True:
            now = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._refilled) * self._per_second)
            self._refilled = now
            if self._tokens >= 1:
                self._tokens -= 1
                return
            await asyncio.sleep(self._pause)
