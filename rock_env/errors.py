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


class JobNotFound(RockError):
    """The sandbox has no job with this id, or not any more."""

    code = "job_not_found"


class ForwardFailed(RockError):
    """Nobody listens on the port inside the sandbox, or a forwarded connection is not there any more."""

    code = "forward_failed"


class LeaseLost(RockError):
    """A model request is not this caller's to answer: it was answered, has gone, or is in other hands."""

    code = "lease_lost"


class SandboxDead(RockError):
    """The sandbox, or the supervisor that held it, has ended; the message says why."""

    code = "dead"


class RequestTimeout(RockError):
    """The supervisor did not answer before the request's deadline (not to be confused with a command's timeout)."""

    code = "request_timeout"


class NotReady(RockError):
    """The sandbox has not started yet, or is being stopped: ask again later."""

    code = "not_ready"


class Unauthorized(RockError):
    """No credential, or one that is unknown, expired or revoked."""

    code = "unauthorized"


class Forbidden(RockError):
    """The credential is valid, but does not cover this; the message names what is missing."""

    code = "forbidden"


class QuotaExceeded(RockError):
    """The tenant has used up a quota; the message names it."""

    code = "quota_exceeded"


class NoCapacity(RockError):
    """No worker has room for the sandbox now."""

    code = "no_capacity"


class EntryNotFound(RockError):
    """The hub has no such entry, or none that is yours or public."""

    code = "no_entry"


class VersionTaken(RockError):
    """A version of a hub's entry is immutable: its content is another, or was deleted."""

    code = "version_taken"


class EntryCorrupt(RockError):
    """A hub's entry is not what was published; the message names the file, and the digests expected and found."""

    code = "corrupt"


class EnvNotFound(RockError):
    """No environment with this id: it was closed, was idle for too long, or went with its admin."""

    code = "no_env"


class ResetNeeded(RockError):
    """The episode has not begun, or is over: reset comes before the next step."""

    code = "reset_needed"


class VerifierFailed(RockError):
    """A task's tests took too long, or left no usable reward."""

    code = "verifier_failed"


class EnvFailed(RockError):
    """An environment failed otherwise than by its sandbox; the episode says nothing about the agent."""

    code = "env_failed"


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
        JobNotFound,
        ForwardFailed,
        LeaseLost,
        SandboxDead,
        RequestTimeout,
        NotReady,
        Unauthorized,
        Forbidden,
        QuotaExceeded,
        NoCapacity,
        EntryNotFound,
        VersionTaken,
        EntryCorrupt,
        EnvNotFound,
        ResetNeeded,
        VerifierFailed,
        EnvFailed,
        FileError,
    )
}


def to_wire(error: RockError) -> dict[str, str]:
    """{"code", "message", "errno"} of an exception."""
    return {"code": error.code, "message": str(error), "errno": getattr(error, "errno_name", "")}


def from_wire(error: dict[str, str]) -> RockError:
    """Rebuild the exception that a supervisor, a worker or an admin reported as {"code", "message", "errno"?}."""
    cls = ERRORS.get(error["code"], RockError)
    if cls is FileError:
        return FileError(error["message"], error.get("errno", ""))
    return cls(error["message"])
