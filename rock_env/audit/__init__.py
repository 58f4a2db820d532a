"""Read and verify audit logs: `verify_audit_log(path)`, or `python -m rock_env.audit verify PATH [--head SHA256]`.

Format and durability: rock_env.supervisor.journal. The chain shows edits, insertions, deletions and reordering; the
head file shows a cut at the end. Whoever may write both files can forge both: keep a head elsewhere (`--head`) where
that matters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rock_env.supervisor.journal import GENESIS, digest, head_text
from rock_env.supervisor.retention import HEAD_SUFFIX


@dataclass(frozen=True)
class AuditVerdict:
    """What a verification found.

    Attributes:
      ok: nothing was changed, removed or reordered.
      problem: the first thing that is wrong, with its line number; "" when ok.
      records: how many records could be verified.
      head: SHA-256 of the last of them (64 zeros when there is none).
      closed: the log ends with its writer's last record. A writer that was killed leaves it open, which is no problem.
    """

    ok: bool
    problem: str
    records: int
    head: str
    closed: bool


def read_audit_log(path: str | Path) -> Iterator[dict]:
    """The records, in order, unverified. A last line that was cut off in the middle is left out."""
    for line in Path(path).read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)


def verify_audit_log(path: str | Path, head: str | None = None) -> AuditVerdict:
    """Check the chain from the first record to the last, and its end against the head. Its writer may go on meanwhile.

    Args:
      path: the log.
      head: SHA-256 of a record that must be in the log, e.g. noted elsewhere earlier. The head file is checked always.

    Raises:
      OSError: the log cannot be read.
    """
    before = _head_file(path)
    lines = Path(path).read_bytes().split(b"\n")
    rest = lines.pop()
    previous, hashes, event = GENESIS, [], ""
    problem = ""
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            found = {"n": record["n"], "previous": record["previous"]}
            event = record["event"]
        except (ValueError, TypeError, KeyError) as error:
            problem = f"line {number + 1}: not a record ({type(error).__name__}: {error})"
            break
        if found != {"n": number, "previous": previous}:
            problem = f"line {number + 1}: expected record {number} after {previous[:16]}..., found {found['n']} after "
            problem += f"{str(found['previous'])[:16]}...: a record was changed, removed, inserted or moved"
            break
        previous = digest(line)
        hashes.append(previous)
    problem = problem or _check_end(before, _head_file(path), hashes, rest)
    if not problem and head is not None and head not in hashes:
        problem = f"no record has the hash {head}"
    return AuditVerdict(not problem, problem, len(hashes), previous, event == "log_closed")


def _head_file(path: str | Path) -> bytes | OSError:
    try:
        return Path(f"{path}{HEAD_SUFFIX}").read_bytes()
    except OSError as error:
        return error


def _check_end(before: bytes | OSError, head: bytes | OSError, hashes: list[str], rest: bytes) -> str:
    """Compare with the head file, as it was before the log was read and as it is now.

    A writer killed between its two writes leaves a head that is one record behind. One that goes on writing leaves a
    head beyond what was read: then the log must hold the record of the head before.
    """
    if isinstance(head, OSError):
        return f"head file: {head.strerror}"
    if not hashes and not rest and not head:
        return "no record: even the first is missing"
    count, told = len(hashes), _records_told(head)
    if told >= count - 1 and _is_of(head, hashes):
        return "" if not rest else f"line {count + 1}: cut off in the middle"
    if head != before and told > count and not isinstance(before, OSError) and _is_of(before, hashes):
        return ""
    return f"the end: {count} records, but the head file says {head[:37].decode(errors='replace').lstrip('0')}..."


def _records_told(head: bytes) -> int:
    """How many records a head file tells of; −1 if it is none."""
    number = head.partition(b" ")[0] if head else b"0"
    return int(number) if number.isdigit() else -1


def _is_of(head: bytes, hashes: list[str]) -> bool:
    """Whether a head file is, or was, that of a log whose records have these hashes."""
    told = _records_told(head)
    if not 0 <= told <= len(hashes):
        return False
    return head == head_text(told, hashes[told - 1] if told else GENESIS) or not head
