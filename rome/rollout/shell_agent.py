"""A whole agent in one file: it asks its model over OpenAI's API, runs the shell command that comes back, and repeats.

This file is copied into the sandbox and run there (`rollout.agent = "native"`), so it uses the standard library alone
and imports nothing of this package. Any other program that speaks the API can take its place.

    OPENAI_BASE_URL, OPENAI_API_KEY   of the model
    ROME_INSTRUCTION                  the task
    ROME_MAX_TURNS, ROME_MAX_OUTPUT, ROME_COMMAND_SECONDS   requests, characters of an output, seconds of a command
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request

CUT = "\n[cut]"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "shell",
            "description": "Runs a command in a bash that lives as long as the task.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}},
                "required": ["command"],
            },
        },
    }
]


class Shell:
    """A bash that keeps its directory and variables between commands; one that ended or hung is replaced."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)
        self._start()

    def _start(self) -> None:
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, command: str, seconds: float) -> tuple[str, int]:
        """Output and exit code; 124 for a command that took too long."""
        if "\0" in command:
            return "bash: a NUL byte can't be part of a command", 2
        line = f"eval {shlex.quote(command)} </dev/null; printf '\\n{self._mark} %d\\n' \"$?\"\n"
        output, deadline = b"", time.monotonic() + seconds
        end = f"\n{self._mark} ".encode()
        with contextlib.suppress(BrokenPipeError):  # reading tells
            self._bash.stdin.write(line.encode())
            self._bash.stdin.flush()
        while not (end in output and output.endswith(b"\n")):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._bash.stdout], [], [], left)[0]:
                return self._replace(output), 124
            piece = os.read(self._bash.stdout.fileno(), 65536)
            if not piece:  # the command ended its own shell
                code = self._bash.wait()
                return self._replace(output), code if code >= 0 else 128 - code
            output += piece
        text, _, code = output.rpartition(end)
        return text.decode(errors="replace"), int(code)

    def _replace(self, output: bytes) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()
        self._start()
        return output.decode(errors="replace")


def observation(output: str, code: int, limit: int) -> str:
    """What the model is told of a command: the same text as in the environments that run commands themselves."""
    text = output.rstrip("\n")
    if len(text) > limit:
        text = text[: limit - len(CUT)] + CUT
    if code:
        text = f"{text}\n[exit {code}]" if text else f"[exit {code}]"
    return text


def ask(messages: list[dict]) -> dict:
    """The model's next message. Raises urllib.error.HTTPError, e.g. where its context is full."""
    body = json.dumps({"model": "policy", "messages": messages, "tools": TOOLS}).encode()
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]


def main() -> None:
    limit, seconds = int(os.environ["ROME_MAX_OUTPUT"]), float(os.environ["ROME_COMMAND_SECONDS"])
    shell, messages = Shell(), [{"role": "user", "content": os.environ["ROME_INSTRUCTION"]}]
    for _ in range(int(os.environ["ROME_MAX_TURNS"])):
        try:
            message = ask(messages)
        except urllib.error.HTTPError as error:
            print(f"the model answered {error.code}: {error.read().decode(errors='replace')}")
            return
        calls = message.get("tool_calls")
        if not calls:
            return  # the final answer
        command = json.loads(calls[0]["function"]["arguments"])["command"]
        text = observation(*shell.run(command, seconds), limit)
        messages += [message, {"role": "tool", "tool_call_id": calls[0]["id"], "content": text}]


if __name__ == "__main__":
    main()
