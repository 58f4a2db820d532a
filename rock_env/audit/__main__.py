"""`python -m rock_env.audit verify PATH [--head SHA256]`. Exit code: 0 intact, 1 tampered with, 2 unreadable."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rock_env.audit import verify_audit_log


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m rock_env.audit", description="Verify a sandbox audit log.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check the hash chain and the end of a log")
    verify.add_argument("path", type=Path)
    verify.add_argument("--head", help="SHA-256 of a record that must be in the log")
    parsed = parser.parse_args(arguments)
    try:
        verdict = verify_audit_log(parsed.path, parsed.head)
    except OSError as error:
        print(f"{parsed.path}: {error.strerror}", file=sys.stderr)
        return 2
    if not verdict.ok:
        print(f"{parsed.path}: {verdict.problem}", file=sys.stderr)
        return 1
    state = "closed" if verdict.closed else "not closed (its writer runs, or was killed)"
    print(f"{parsed.path}: intact, {verdict.records} records, {state}, head {verdict.head}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
