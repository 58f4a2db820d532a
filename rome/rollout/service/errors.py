"""The errors of the service, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ServiceError(Exception):
    """What a client gets instead of an answer: an HTTP status, a message, the field that is wrong, a code."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str | None = None) -> ServiceError:
    """A 400 for a field: says what was expected."""
    return ServiceError(400, f"{param}: {message}", param, code)
