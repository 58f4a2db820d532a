"""rl-rock's side of benchmarks/sandbox.py: sessions of its rocklet, in this process (a bash without a sandbox).

Runs in a Python that has `rl-rock[rocklet]`; prints one JSON object: milliseconds by operation.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from rock.admin.proto.request import SandboxBashAction, SandboxCloseBashSessionRequest, SandboxCreateBashSessionRequest
from rock.rocklet.linux import LinuxRocklet

CONCURRENT = 16
HERE = "here"


async def measure(repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    rocklet = LinuxRocklet()
    try:
        await rocklet.create_session(SandboxCreateBashSessionRequest(session="one", sandbox_id=HERE))
        for _ in range(repeats):
            started = time.perf_counter()
            await rocklet.run_in_session(SandboxBashAction(session="one", command="true", sandbox_id=HERE))
            found.setdefault("session: true (builtin)", []).append(1e3 * (time.perf_counter() - started))
        for number in range(max(2, repeats // 10)):
            names = [f"s{number}-{i}" for i in range(CONCURRENT)]
            started = time.perf_counter()
            await asyncio.gather(
                *(rocklet.create_session(SandboxCreateBashSessionRequest(session=n, sandbox_id=HERE)) for n in names)
            )
            key = f"{CONCURRENT} concurrent sessions"
            found.setdefault(key, []).append(1e3 * (time.perf_counter() - started))
            await asyncio.gather(
                *(rocklet.close_session(SandboxCloseBashSessionRequest(session=n, sandbox_id=HERE)) for n in names)
            )
    finally:
        await rocklet.close()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1])))))
