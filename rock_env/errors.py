"""Exceptions of the sandbox SDK. Each is an infrastructure fault: a failing command is a CommandResult instead."""

from __future__ import annotations


class RockError(Exception):
    """Base of every error that rock_env raises."""

    code = "error"


class BackendUnavailable(RockError):
    """This machine lacks something the backend needs; the message names it and the remedy."""

    code = "unavailable"


class SpecError(RockError, ValueError):
    """A field of a spec or an argument of a call is not acceptable; the message names it and what was expected."""

    code = "spec"


class LimitNotEnforceable(SpecError):
    """A limit of the spec cannot be enforced on this machine; the message names it and how to relax it."""

    code = "limit_not_enforceable"


class LimitExceeded(RockError):
    """An operation needs more than a limit of the sandbox (or a full disk) allows; nothing was half-written."""

    code = "limit_exceeded"


class SandboxNotFound(RockError):
    """No sandbox or snapshot with this id."""

    code = "not_found"


class SandboxDead(RockError):
    """The sandbox, or the supervisor that held it, has ended; the message says why."""

    code = "dead"


class RequestTimeout(RockError):
    """The supervisor did not answer before the request's deadline (not to be confused with a command's timeout)."""

    code = "request_timeout"


class FileError(RockError, OSError):
    """A file operation inside the sandbox failed; `errno_name` is the symbolic errno, e.g. "ENOENT"."""

    code = "file"

    def __init__(self, message: str, errno_name: str = "") -> None:
        super().__init__(message)
        self.errno_name = errno_name


ERRORS: dict[str, type[RockError]] = {
    cls.code: cls
    for cls in (
        RockError,
        BackendUnavailable,
        SpecError,
        LimitNotEnforceable,
        LimitExceeded,
        SandboxNotFound,
        SandboxDead,
        RequestTimeout,
        FileError,
    )
}


def from_wire(error: dict[str, str]) -> RockError:
    """Rebuild the exception that a supervisor reported as {"code", "message", "errno"?}."""
    cls = ERRORS.get(error["code"], RockError)
    if cls is FileError:
        return FileError(error["message"], error.get("errno", ""))
    return cls(error["message"])
