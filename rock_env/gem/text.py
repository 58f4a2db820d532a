"""Text in, text out: the space of commands and of what they print, and how a command's outcome becomes text."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from rock_env.sandbox import Session
from rock_env.spec import CommandResult

MAX_TEXT = 2**20
CUT = "\n[cut]"


class AnyText(gymnasium.Space[str]):
    """Every string of at most `max_length` characters, whatever the characters: a command may print anything."""

    def __init__(self, max_length: int = MAX_TEXT, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(dtype=str, seed=seed)
        self.max_length = max_length

    def sample(self, mask: None = None, probability: None = None) -> str:
        """A short word: as an action, a final answer."""
        return "".join(self.np_random.choice(list("abcdefghij"), size=8))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length


def run_command(session: Session, command: str, seconds: float) -> CommandResult:
    """Run what an agent wrote. NUL, which no shell takes, is the agent's error, as any other wrong command is."""
    if "\0" in command:
        return CommandResult(2, "bash: a NUL byte can't be part of a command")
    return session.run(command, timeout=seconds)


def render(result: CommandResult, max_chars: int) -> str:
    """The output without trailing newlines, cut at `max_chars`, and "[exit N]" when the command failed."""
    text = result.output.rstrip("\n")
    if len(text) > max_chars:
        text = text[: max_chars - len(CUT)] + CUT
    if result.exit_code != 0:
        text = f"{text}\n[exit {result.exit_code}]" if text else f"[exit {result.exit_code}]"
    return text
