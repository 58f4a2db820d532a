"""The verifier: tests that enter a sandbox after the agent has stopped, and the reward that they write.

The tests run as the same user as the agent did, so the defence is time: every process of the agent is killed first
(the sandbox sees to it that no fork escapes), what it may have put where tests and rewards go is thrown away, and only
then do the tests enter. They run as a new process with a clean environment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from rock_env.errors import FileError, LimitExceeded, VerifierFailed
from rock_env.harbor.format import VerifiedEnvironment
from rock_env.sandbox import Sandbox
from rock_env.spec import FileEntry

TESTS = "/tests"
REWARDS = "/logs/verifier"
_MAX_REWARD_BYTES = 64 * 1024

# What can't be removed is moved out of the way: a folder's own permissions don't stop a rename.
_CLEAR = f"""for place in {TESTS} /logs; do
  [ -e "$place" ] || [ -L "$place" ] || continue
  chmod -R u+rwX "$place" 2>/dev/null
  rm -rf "$place" 2>/dev/null || mv "$place" "$(mktemp -d)"
done
"""
_RESERVE = f"{REWARDS}/.reserve"
_RESERVE_BYTES = 64 * 1024
_RUN = f': > {_RESERVE}; cd "$1" 2>/dev/null || cd /; exec {TESTS}/test.sh'


def run_verifier(sandbox: Sandbox, task: VerifiedEnvironment) -> float:
    """Ends the agent, brings in the tests, runs them, reads the reward they wrote.

    An agent that filled its disk so that the tests have no room gets 0: that is its doing, not the infrastructure's.

    Raises:
      VerifierFailed: the tests took too long, or left no usable reward.
      RockError: the sandbox failed.
    """
    sandbox.kill_all()
    if {info.name for info in sandbox.list_files("/")} & {TESTS.strip("/"), "logs"}:  # rarely: it costs a process
        sandbox.execute(["/bin/sh", "-c", _CLEAR], timeout=task.verifier.timeout_seconds, cwd="/")
    files = {
        f"{TESTS}/{name}": FileEntry(file.content, file.mode | 0o755 if name == "test.sh" else file.mode)
        for name, file in task.verifier.files.items()
    }
    # These make the folder, and make sure of room for what the tests write.
    files |= {_RESERVE: FileEntry(bytes(_RESERVE_BYTES)), f"{REWARDS}/reward.txt": FileEntry(b"")}
    try:
        sandbox.write_files(files)
    except LimitExceeded:
        return 0.0
    result = sandbox.execute(
        ["/bin/sh", "-c", _RUN, "sh", task.workdir],
        timeout=task.verifier.timeout_seconds,
        cwd="/",
        env=dict(task.verifier.env),
    )
    if result.timed_out:
        raise VerifierFailed(f"the tests took more than {task.verifier.timeout_seconds} s")
    reward = _read(sandbox, "reward.txt", _parse_text)
    if reward is None:
        reward = _read(sandbox, "reward.json", _parse_json)
    if reward is None:
        raise VerifierFailed(
            f"no usable reward in {REWARDS}; exit code {result.exit_code}, output {result.output[-300:]!r}"
        )
    return reward


def _read(sandbox: Sandbox, name: str, parse: Callable[[str], Any]) -> float | None:
    """The reward in a file; None when the file is missing or holds no finite number."""
    try:
        text = sandbox.read_file(f"{REWARDS}/{name}", max_bytes=_MAX_REWARD_BYTES).decode()
        reward = float(parse(text))
    except (FileError, ValueError, TypeError, LookupError):
        return None
    return reward if math.isfinite(reward) else None


def _parse_text(text: str) -> str:
    return text.strip()


def _parse_json(text: str) -> Any:
    """Harbor's reward.json: a number, or an object with `reward` or with a single entry."""
    value = json.loads(text)
    if isinstance(value, dict):
        return value["reward"] if "reward" in value or len(value) != 1 else next(iter(value.values()))
    return value
