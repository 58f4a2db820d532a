"""SWE-ReX's side of benchmarks/sandbox.py: sessions in its local deployment (a bash without any sandbox around it).

Runs in a Python that has `swe-rex`; prints one JSON object: milliseconds by operation.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from swerex.deployment.local import LocalDeployment
from swerex.runtime.abstract import BashAction, CloseBashSessionRequest, CreateBashSessionRequest

CONCURRENT = 16


async def measure(repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    deployment = LocalDeployment()
    await deployment.start()
    runtime = deployment.runtime
    try:
        await runtime.create_session(CreateBashSessionRequest(session="one"))
        for _ in range(repeats):
            started = time.perf_counter()
            await runtime.run_in_session(BashAction(session="one", command="true"))
            found.setdefault("session: true (builtin)", []).append(1e3 * (time.perf_counter() - started))
        for number in range(max(2, repeats // 10)):
            names = [f"s{number}-{i}" for i in range(CONCURRENT)]
            started = time.perf_counter()
            await asyncio.gather(*(runtime.create_session(CreateBashSessionRequest(session=name)) for name in names))
            key = f"{CONCURRENT} concurrent sessions"
            found.setdefault(key, []).append(1e3 * (time.perf_counter() - started))
            await asyncio.gather(*(runtime.close_session(CloseBashSessionRequest(session=name)) for name in names))
    finally:
        await deployment.stop()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1])))))
