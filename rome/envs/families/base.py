"""What a family is made of: seeded draws, an expert's steps with the mistakes they invite, and the checks.

A family is one class with a `name` and a `build`; `build(draw, steps)` returns a `Draft` whose expert takes exactly
`steps` commands before it stops. Two shapes cover most of them: `trail` (follow pointers through files to a list, then
act on its items) and `visits` (look at each item, then act on what was seen).
"""

from __future__ import annotations

import random
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, TypeVar

from rome.envs.families.words import WORDS

T = TypeVar("T")

MIN_HORIZON = 2
MAX_HORIZON = 12


class Draw:
    """Everything that varies between two tasks of a family comes from here; the key determines it all."""

    def __init__(self, *key: object) -> None:
        # A str seed is hashed with SHA-512: the same on every machine and Python version.
        self.random = random.Random(":".join(map(str, key)))
        self._words = self.random.sample(WORDS, len(WORDS))
        self._codes: set[str] = set()

    def word(self) -> str:
        """A name that this task hasn't used yet."""
        return self._words.pop()

    def words(self, count: int) -> list[str]:
        return [self.word() for _ in range(count)]

    def code(self) -> str:
        """Four digits that this task hasn't used yet."""
        while (code := str(self.random.randrange(1000, 10000))) in self._codes:
            pass
        self._codes.add(code)
        return code

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.random.sample(values, len(values))

    def fork(self, wrong: str, right: str, separator: str = "\n") -> str:
        """The two branches in random order, so that place says nothing about which is right."""
        return separator.join(self.shuffled([wrong, right]))


@dataclass(frozen=True)
class Step:
    """One command of the reference expert, and the plausible mistakes in its place.

    Attributes:
      acts: the verifier depends on it: an expert that stops before it fails.
      item: number of the work item that it serves; leaving out all steps of an item fails the task. None: can't be
        left out without making later commands refer to what was never seen.
      swaps: wrong commands in its place, after which the rest goes on as usual.
      detours: wrong turns: sequences that replace this command and all that follow it.
    """

    command: str
    acts: bool = False
    item: int | None = None
    swaps: tuple[str, ...] = ()
    detours: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Draft:
    """A task before it becomes a folder. `files` are relative to the working directory; `checks` are shell conditions
    that all hold if and only if the task is solved."""

    instruction: str
    files: dict[str, str]
    steps: tuple[Step, ...]
    checks: tuple[str, ...]


class Family(ABC):
    """A procedural generator of tasks."""

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ()
    """Programs that the sandbox needs beyond the shell and coreutils."""

    @abstractmethod
    def build(self, draw: Draw, steps: int) -> Draft:
        """A task whose expert takes `steps` ≥ 1 commands, then stops."""


def answered(text: str) -> str:
    """Condition: answer.txt holds this text (trailing newlines aside)."""
    return f"answered {shlex.quote(text)}"


def hold(files: dict[str, str]) -> str:
    """Condition: all these regular files hold exactly these lines. One process looks at all of them."""
    shown = "\n\n".join(f"==> {path} <==\n{text}" for path, text in files.items())
    return f"hold {shlex.quote(shown)} {' '.join(files)}"


def prints(command: str, lines: Sequence[str]) -> str:
    """Condition: the command prints these lines."""
    return f'[ "$({command})" = {shlex.quote(chr(10).join(lines))} ]'


def inline(ask: str, seen: str) -> str:
    """The shortest tasks leave no step for looking: what the look would show stands in the instruction."""
    return f"{ask} {seen}".replace("\n", " ")


def split_steps(draw: Draw, steps: int, most_items: int) -> tuple[int, int]:
    """(reads, items) with reads + items == steps; at least one of each when there are two steps or more."""
    if steps == 1:
        return 0, 1
    high = min(most_items, steps - 1)
    items = draw.between(min(high, max(1, steps // 3)), high)
    return steps - items, items


@dataclass
class Listing:
    """A file that says what to do: its text, the steps that do it, and what else has to exist."""

    text: str
    steps: list[Step]
    files: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(step.command for step in self.steps)


def trail(
    draw: Draw, steps: int, ask: Callable[[str], str], make: Callable[[int], Listing], suffix: str, most_items: int
) -> Draft:
    """Pointers lead from file to file to a listing; every pointer also names an old file, whose listing is a decoy.

    Args:
      ask: the instruction, given the name of the first file ('' when there is nothing to read).
      make: a listing with that many items; called again for the decoy.
    """
    reads, items = split_steps(draw, steps, most_items)
    real = make(items)
    if reads == 0:
        return Draft(inline(ask(""), real.text), real.files, tuple(real.steps), tuple(real.checks))
    path = [word + suffix for word in draw.words(reads)]
    files = {**real.files, path[-1]: real.text}
    trodden = [Step(f"cat {path[0]}")]
    if reads > 1:
        decoy = make(min(items, 2))
        files.update(decoy.files)
    for here, following in pairwise(path):
        old = draw.word() + suffix
        files[here] = draw.fork(f"old: {old}", f"next: {following}")
        files[old] = decoy.text
        trodden.append(Step(f"cat {following}", detours=((f"cat {old}", *decoy.commands),)))
    return Draft(ask(path[0]), files, (*trodden, *real.steps), tuple(real.checks))


@dataclass
class Visit:
    """One item of a two-step routine: a look at it, what the look shows, and the act that this calls for.

    `answer` is what the act appends to answer.txt, if it does. `leaves` are files as they are after the act; the
    item's own name is gone then, if it isn't among them.
    """

    look: str
    shows: str
    act: str
    wrong_acts: tuple[str, ...]
    files: dict[str, str]
    answer: str = ""
    leaves: dict[str, str] = field(default_factory=dict)


def visits(draw: Draw, steps: int, ask: str, visit: Callable[[str], Visit], suffix: str) -> Draft:
    """Look, act, look, act … over the files that the instruction lists; with an odd number of steps, a manifest that is
    read first lists them, beside an old file that is to be left alone. `ask` has a place for `{items}`."""
    names = [word + suffix for word in draw.words(max(1, steps // 2))]
    items = [visit(name) for name in names]
    files = {path: text for item in items for path, text in item.files.items()}
    if answers := [item.answer for item in items if item.answer]:
        checks = [answered("\n".join(answers))]
    else:
        checks = [hold({path: text for item in items for path, text in item.leaves.items()})]
        checks += [f"[ ! -e {name} ]" for name, item in zip(names, items, strict=True) if name not in item.leaves]
    listed = " ".join(names)
    taken = [
        step
        for number, item in enumerate(items)
        for step in (Step(item.look, item=number), Step(item.act, acts=True, item=number, swaps=item.wrong_acts))
    ]
    if steps == 1:
        return Draft(inline(ask.format(items=listed), items[0].shows), files, (taken[1],), tuple(checks))
    if steps % 2 == 0:
        return Draft(ask.format(items=listed), files, tuple(taken), tuple(checks))
    manifest, old = (word for word in draw.words(2))
    decoy = visit(old + suffix)
    files.update(decoy.files)
    files[f"{manifest}.txt"] = draw.fork(f"old: {old + suffix}", f"new: {listed}")
    taken[0] = Step(taken[0].command, item=0, detours=((decoy.look, decoy.act),))
    if decoy.leaves:
        checks.append(hold({old + suffix: decoy.files[old + suffix]}))
    instruction = ask.format(items=f"the new files of {manifest}.txt")
    return Draft(instruction, files, (Step(f"cat {manifest}.txt"), *taken), tuple(checks))
