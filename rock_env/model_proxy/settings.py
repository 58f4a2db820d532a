"""What a spec says of a sandbox's model."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from rock_env.errors import SpecError

MODES = ("pull", "push", "replay")
MAX_BODY_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MODEL = re.compile(r"[!-~]{1,200}")


def check_url(url: str) -> str:
    """An http URL of this machine's loopback. Raises SpecError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback, parts, port = False, urlsplit(""), None
    if not is_loopback or parts.scheme != "http" or port is None or parts.username or parts.query or parts.fragment:
        raise SpecError(f"model_proxy.url: expected http://LOOPBACK:PORT/..., got {url!r}")
    return url


@dataclass(frozen=True)
class ModelProxy:
    """A model endpoint inside the sandbox: OPENAI_BASE_URL and ANTHROPIC_BASE_URL name it to programs.

    Attributes:
      mode: "pull": requests wait for `Sandbox.model.next()`. "push": they go to `url`. "replay": they are answered from
        the file `replay`, as they were when it was recorded.
      url: for push, of an OpenAI-compatible server on this machine's loopback, e.g. "http://127.0.0.1:8000/v1". Over
        REST: the name of one of the admin's models.
      api_key: for `url`; added outside. Nothing of the sandbox ever sees it.
      models: names that `GET /v1/models` tells of (push: the server tells).
      request_seconds: after which the agent gets a 504.
      lease_seconds: pull: who took a request has so long to answer; then it is handed out again.
      max_body_bytes: of a request, and of an answer.
      record: a file of this machine, to which each request is appended with its answer, as a line of JSON.
      replay: a file made by `record`.
    """

    mode: str = "pull"
    url: str = ""
    api_key: str = field(default="", repr=False)
    models: tuple[str, ...] = ("model",)
    request_seconds: float = 600.0
    lease_seconds: float = 120.0
    max_body_bytes: int = 4 << 20
    record: str | None = None
    replay: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SpecError(f"model_proxy.mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if (self.mode == "push") != bool(self.url):
            raise SpecError(f"model_proxy.url: expected one for the mode push, and only for it, got {self.url!r}")
        if self.url and not _NAME.fullmatch(self.url):
            check_url(self.url)
        if not isinstance(self.api_key, str) or not re.fullmatch(r"[!-~]*", self.api_key):
            raise SpecError("model_proxy.api_key: expected visible ASCII")
        object.__setattr__(self, "models", tuple(self.models))
        if not self.models or not all(isinstance(name, str) and _MODEL.fullmatch(name) for name in self.models):
            raise SpecError(f"model_proxy.models: expected names without spaces, got {self.models!r}")
        for name in ("request_seconds", "lease_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
                raise SpecError(f"model_proxy.{name}: expected seconds in (0, 86400], got {value!r}")
        size = self.max_body_bytes
        if isinstance(size, bool) or not isinstance(size, int) or not 1024 <= size <= MAX_BODY_BYTES:
            raise SpecError(f"model_proxy.max_body_bytes: expected 1024..{MAX_BODY_BYTES}, got {size!r}")
        for name in ("record", "replay"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path.startswith("/") or "\0" in path):
                raise SpecError(f"model_proxy.{name}: expected an absolute path, got {path!r}")
        if (self.mode == "replay") != (self.replay is not None):
            raise SpecError("model_proxy.replay: expected a file for the mode replay, and only for it")

    def to_wire(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_wire(cls, wire: dict) -> ModelProxy:
        return cls(**wire)
