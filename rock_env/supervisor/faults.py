"""Errors that travel to the client, and their translation from errno."""

from __future__ import annotations

import errno
import os


class Fault(Exception):
    """An error reply: `code` is one of rock_env.errors.ERRORS."""

    def __init__(self, code: str, message: str, errno_name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.errno_name = errno_name

    def to_wire(self) -> dict[str, str]:
        return {"code": self.code, "message": str(self), "errno": self.errno_name}


def file_fault(error: OSError, what: str) -> Fault:
    """A disk that is full is a limit; anything else is a file error."""
    name = errno.errorcode.get(error.errno or 0, "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("limit_exceeded", f"{what}: no space left (disk_bytes, or the host's memory)", name)
    return Fault("file", f"{what}: {os.strerror(error.errno or 0)}", name)
