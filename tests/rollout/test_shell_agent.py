"""The agent program that is shipped: its shell behaves as that of the environments, its loop ends where it should."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading

import pytest

from rock_env import Sandbox, SandboxSpec
from rock_env.gem.text import render, run_command
from rome.rollout import shell_agent

COMMANDS = [
    "cd /tmp && x=5 && pwd",
    "echo $x; pwd; echo err >&2",
    "false",
    "printf 'no newline'; printf ' at the end' >&2; exit_code() { return 7; }; exit_code",
    "cat; echo 'read nothing'",
    "for i in 1 2 3; do echo \"line $i 'quoted'\"; done",
    "nonsense-command",
    "head -c 500 /dev/zero | tr '\\0' 'x'",
    "echo 'unbalanced",
    "echo \x00",
]


def test_it_tells_the_policy_what_the_environments_do(sandbox_machine):
    shell = shell_agent.Shell()
    with Sandbox.start(SandboxSpec()) as box:
        session = box.session()
        for command in COMMANDS:
            expected = render(run_command(session, command, 20.0), 200)
            found = shell_agent.observation(*shell.run(command, 20.0), 200)
            # which line of what bash complains about is its own affair
            assert [line.partition("line ")[0] for line in found.splitlines()[-1:]] == [
                line.partition("line ")[0] for line in expected.splitlines()[-1:]
            ], command
            if "bash:" not in expected:
                assert found == expected, command


def test_a_shell_that_ends_or_hangs_is_replaced():
    shell = shell_agent.Shell()
    assert shell.run("echo before; exit 3", 20.0) == ("before\n", 3)
    assert shell.run("echo after", 20.0)[0].strip() == "after"
    text, code = shell.run("echo begun; sleep 1000", 1.0)
    assert (text.strip(), code) == ("begun", 124)
    assert shell.run("kill -9 $$", 20.0)[1] == 137
    assert shell.run("echo again", 20.0)[0].strip() == "again"


class _Model(http.server.BaseHTTPRequestHandler):
    """Answers with what the test has put down, and keeps what it was asked."""

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, message = self.server.script.pop(0)
        body = json.dumps({"choices": [{"message": message}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def call(command):
    function = {"name": "shell", "arguments": json.dumps({"command": command})}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("script", "turns", "asked"),
    [
        ([(200, call("echo one")), (200, {"role": "assistant", "content": "done"})], 5, 2),
        ([(200, call("echo one")), (400, {})], 5, 2),  # its context is full
        ([(200, call("echo one"))] * 3, 3, 3),
    ],
)
def test_the_loop_ends_with_an_answer_an_error_or_its_last_turn(script, turns, asked):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Model)
    server.script, server.asked = list(script), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {
        "PATH": "/usr/bin:/bin",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1",
        "ROME_INSTRUCTION": "do it",
        "ROME_MAX_TURNS": str(turns),
        "ROME_MAX_OUTPUT": "100",
        "ROME_COMMAND_SECONDS": "20",
    }
    command = [sys.executable, "-I", "-S", shell_agent.__file__]  # with nothing but the standard library
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert len(server.asked) == asked
    assert server.asked[0]["messages"] == [{"role": "user", "content": "do it"}]
    assert server.asked[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c", "content": "one"}
