"""What tests of the model endpoint share: an agent for inside the sandbox, and a model server for outside."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECONDS = 60.0
KEY = "sk-very-secret-4f1d"
# The agent: reads requests [{"path", "body"}...] and prints [{"status", "body"}...]; several at once with "together".
AGENT = r"""
import http.client, json, os, sys, threading, urllib.parse
base = urllib.parse.urlsplit(os.environ["ANTHROPIC_BASE_URL"])
asked = json.load(open(sys.argv[1]))
answers = [None] * len(asked)
def ask(number):
    one = asked[number]
    connection = http.client.HTTPConnection(base.hostname, base.port, timeout=100)
    try:
        body = one["body"] if isinstance(one["body"], str) else json.dumps(one["body"])
        connection.request(one.get("method", "POST"), one["path"], body, one.get("headers", {}), encode_chunked=False)
        response = connection.getresponse()
        answers[number] = {"status": response.status, "body": response.read().decode()}
    except Exception as error:
        answers[number] = {"status": 0, "body": repr(error)}
threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
for thread in threads:
    thread.start()
    if len(sys.argv) < 3:
        thread.join()
for thread in threads:
    thread.join()
print(json.dumps(answers))
"""


def chat(text="hi", **more):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    return {"path": "/v1/chat/completions", "body": body}


def messages(text="hi", **more):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": text}], **more}
    return {"path": "/v1/messages", "body": body}


def completion(text, **more):
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {"id": "c1", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}],
            "usage": usage}  # fmt: skip


def chunk(text, reason=None):
    return {"id": "c1", "choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}]}


def ask(box, *requests, together=False):
    """Start the agent with these requests. Returns its job, for `answers_of`."""
    name = f"asked-{time.monotonic_ns()}.json"
    box.write_files({name: json.dumps(requests), "agent.py": AGENT})
    return box.start_job(["python3", "agent.py", name, *(["together"] if together else [])], timeout=SECONDS * 2)


def answers_of(job):
    output = b"".join(piece.data for piece in job.stream()).decode()
    try:
        return json.loads(output)
    except ValueError:
        raise AssertionError(output) from None


def take(box):
    request = box.model.next(SECONDS)
    assert request is not None
    return request


def events(body):
    """[(event, data)...] of server-sent events; the event is "" where there is no name."""
    found = []
    for block in body.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        data = lines["data"]
        found.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def text_of(body):
    """The text of a chat completion's stream, which has to be whole."""
    found = events(body)
    assert found[-1] == ("", "[DONE]"), found
    return "".join(c["delta"].get("content", "") for _, e in found[:-1] for c in e["choices"])


class ModelServer:
    """An OpenAI-compatible server on the host's loopback, which repeats what it is asked."""

    def __init__(self):
        self.seen = []  # (path, Authorization, body)
        self.hung_up = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _json(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                outer.seen.append((self.path, self.headers["Authorization"], None))
                self._json(200, {"object": "list", "data": [{"id": "served", "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, self.headers["Authorization"], body))
                text = body["messages"][-1]["content"]
                if text == "fail":
                    error = {"message": f"bad key {self.headers['Authorization'][7:]}", "type": "x", "code": "y"}
                    self._json(400, {"error": error})
                elif text == "break":
                    self.close_connection = True
                elif body.get("stream"):
                    self._stream(text)
                else:
                    self._json(200, completion(f"echo {text}"))

            def _stream(self, text):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    for word in text.split() if text != "forever" else iter(int, 1):
                        self.wfile.write(f"data: {json.dumps(chunk(f'{word} '))}\n\n".encode())
                        time.sleep(0.05)
                    self.wfile.write(f"data: {json.dumps(chunk('', 'stop'))}\n\ndata: [DONE]\n\n".encode())
                except OSError:
                    outer.hung_up.set()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
