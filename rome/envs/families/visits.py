"""Families that look at each item and act on what they saw; and the repair loop of a failing test."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from rome.envs.families.base import Draft, Draw, Family, Step, Visit, hold, inline, visits

COLUMNS = ("cost", "rate", "size", "load", "mass", "heat", "cash", "dose")


class Table:
    """Rows of three-digit numbers under a header that numbers its columns, in an order of the table's own.

    No two columns have the same sum or put the rows into the same order: only the wanted one gives its answer.
    """

    def __init__(self, draw: Draw, wanted: str, rows: int = 4) -> None:
        others = draw.shuffled([column for column in COLUMNS if column != wanted])[:2]
        columns = draw.shuffled([wanted, *others])
        self.wanted = columns.index(wanted) + 1
        self.others = [number for number in (1, 2, 3) if number != self.wanted]
        self.header = "# " + " ".join(f"{column}={number}" for number, column in enumerate(columns, 1))
        while True:
            # Columns without repeats: the order by any of them is unique.
            values = [draw.random.sample(range(100, 1000), rows) for _ in columns]
            self.rows = list(zip(*values, strict=True))
            if len({sum(column) for column in values}) == len({self.ordered(n) for n in (1, 2, 3)}) == 3:
                break

    @property
    def text(self) -> str:
        return self._lines(self.rows)

    def ordered(self, column: int) -> str:
        return self._lines(sorted(self.rows, key=lambda row: row[column - 1]))

    def total(self, column: int) -> str:
        return str(sum(row[column - 1] for row in self.rows))

    def _lines(self, rows: list[tuple[int, ...]]) -> str:
        return "\n".join([self.header, *(" ".join(map(str, row)) for row in rows)])


class ColumnFamily(Family):
    """Do the same to a column of each table; where the column stands, its header tells."""

    instruction: str
    """With {column} and {items}."""
    command: str
    """With {number}, of the column, and {file}; prints the answer."""
    answer: Callable[[Table, int], str]
    """What the command prints, of a table and a column's number."""

    def build(self, draw: Draw, steps: int) -> Draft:
        column = draw.pick(COLUMNS)

        def visit(name: str) -> Visit:
            table = Table(draw, column)

            def act(number: int) -> str:
                return f"{self.command.format(number=number, file=name)} >> answer.txt"

            wrong = tuple(act(number) for number in table.others)
            answer = type(self).answer(table, table.wanted)
            return Visit(f"head -1 {name}", table.header, act(table.wanted), wrong, {name: table.text}, answer=answer)

        return visits(draw, steps, self.instruction.format(column=column, items="{items}"), visit, ".csv")


class AggregateNumbers(ColumnFamily):
    """Sum a column of each table."""

    name = "aggregate_numbers"
    instruction = "Sum {column} of {items} into answer.txt."
    command = "awk '{{s+=${number}}} END {{print s}}' {file}"
    answer = Table.total


class SortRecords(ColumnFamily):
    """Sort each table by a column."""

    name = "sort_records"
    instruction = "Sort {items} by {column} into answer.txt."
    command = "sort -nk{number} {file}"
    answer = Table.ordered


class MoveFiles(Family):
    """Each file names the folder that it belongs in, and an old one."""

    name = "move_files"

    def build(self, draw: Draw, steps: int) -> Draft:
        folders = draw.words(4)

        def visit(name: str) -> Visit:
            old, new = draw.shuffled(folders)[:2]
            text = draw.fork(f"old: {old}/", f"new: {new}/")
            files = {name: text} | {f"{folder}/.keep": "" for folder in folders}
            wrong = (f"mv {name} {old}/",)
            return Visit(f"cat {name}", text, f"mv {name} {new}/", wrong, files, leaves={f"{new}/{name}": text})

        return visits(draw, steps, "Move {items} to the new folders.", visit, ".txt")


class FindChecksum(Family):
    """One of the three files behind each list of checksums is corrupt."""

    name = "find_checksum"

    def build(self, draw: Draw, steps: int) -> Draft:
        def visit(name: str) -> Visit:
            numbers = [draw.code() for _ in range(3)]
            corrupt = draw.pick(numbers)
            files = {number: draw.code() for number in numbers}
            sums = {file: sha256(f"{content}\n".encode()).hexdigest() for file, content in files.items()}
            files[corrupt] = draw.code()
            files[name] = "\n".join(f"{digest}  {file}" for file, digest in sums.items())
            shows = "\n".join(f"{n}: {'FAILED' if n == corrupt else 'OK'}" for n in numbers)
            # The pipe hides sha256sum's exit status: finding what is corrupt is no failed command.
            look = f"sha256sum -c {name} 2>/dev/null | cat"
            wrong = tuple(f"echo {n} >> answer.txt" for n in numbers if n != corrupt)
            return Visit(look, shows, f"echo {corrupt} >> answer.txt", wrong, files, answer=corrupt)

        return visits(draw, steps, "Check {items}. Write the corrupt numbers to answer.txt.", visit, ".sum")


class MergeRecords(Family):
    """Held out of training: append the new part that each file names."""

    name = "merge_records"

    def build(self, draw: Draw, steps: int) -> Draft:
        def visit(name: str) -> Visit:
            old, new = (f"{word}.csv" for word in draw.words(2))
            text = draw.fork(f"old: {old}", f"new: {new}")
            part = f"{draw.code()}\n{draw.code()}"
            files = {name: text, old: draw.code(), new: part}
            wrong = (f"cat {old} >> answer.txt",)
            return Visit(f"cat {name}", text, f"cat {new} >> answer.txt", wrong, files, answer=part)

        return visits(draw, steps, "Merge the new parts of {items} into answer.txt.", visit, ".txt")


_TEST_PY = """for caller, callee, want in {cases}:
    scope = {{}}
    for name in callee, caller:
        exec(open(name + ".py").read(), scope)
    got = scope[caller]()
    if got != want:
        print(f"in {{caller}}.py in {{callee}}.py got {{got}} want {{want}}")
        break
else:
    print("ok")
"""


class FixFunction(Family):
    """The test shows the first wrong result and the functions it came through; the fault is in the innermost one."""

    name = "fix_function"
    programs = ("python3",)

    def build(self, draw: Draw, steps: int) -> Draft:
        cases, files, fixed, taken = [], {}, {}, []
        shown = ""
        for _ in range(max(1, steps // 2)):
            caller, callee = draw.words(2)
            got, want = draw.code(), draw.code()
            cases.append((caller, callee, int(want)))
            files[f"{callee}.py"] = f"def {callee}():\n    return {got}"
            files[f"{caller}.py"] = f"def {caller}():\n    # not {got}\n    return {callee}()"
            fixed[f"{callee}.py"] = files[f"{callee}.py"].replace(got, want)
            fixed[f"{caller}.py"] = files[f"{caller}.py"]
            shown = shown or f"in {caller}.py in {callee}.py got {got} want {want}"
            # After a wrong repair the test shows the same again: this expert gives up there.
            wrong = ((f"sed -i s/{got}/{want}/ {caller}.py",), (f"sed -i s/{want}/{got}/ {callee}.py",))
            fix = Step(f"sed -i s/{got}/{want}/ {callee}.py", acts=True, detours=wrong)
            taken += [Step("python3 test.py"), fix]
        # The verifier reads what the agent wrote and never runs it: code could forge the reward.
        checks = (hold(fixed),)
        if steps == 1:
            return Draft(inline("Fix the function.", shown), files, (taken[1],), checks)
        if steps % 2:
            taken.append(Step("python3 test.py"))
        files["test.py"] = _TEST_PY.format(cases=cases).rstrip()
        return Draft("Fix the functions until python3 test.py says ok.", files, tuple(taken), checks)
