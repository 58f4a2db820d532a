"""Families that follow pointers: each file names the next one, and an old one that leads astray."""

from __future__ import annotations

from itertools import pairwise

from rome.envs.families.base import (
    Draft,
    Draw,
    Family,
    Listing,
    Step,
    answered,
    hold,
    inline,
    prints,
    split_steps,
    trail,
)


class FollowHints(Family):
    """From file to file; the last one holds the code. Old branches join a chain that ends in a decoy code."""

    name = "follow_hints"

    def build(self, draw: Draw, steps: int) -> Draft:
        code, old_code, decoy_code = draw.code(), draw.code(), draw.code()
        end = draw.fork(f"old: {old_code}", f"code: {code}")
        write = Step(f"echo {code} > answer.txt", acts=True, swaps=(f"echo {old_code} > answer.txt",))
        checks = (answered(code),)
        if steps == 1:
            return Draft(inline("Write the code to answer.txt.", end), {}, (write,), checks)
        path = [f"{word}.txt" for word in draw.words(steps - 1)]
        astray = [f"{word}.txt" for word in draw.words(min(steps - 1, 3))]
        files = {path[-1]: end, astray[-1]: draw.fork(f"old: {old_code}", f"code: {decoy_code}")}
        for here, following in pairwise(astray):
            files[here] = draw.fork(f"old: {astray[-1]}", f"next: {following}")
        taken = [Step(f"cat {path[0]}")]
        for here, following in pairwise(path):
            turn = draw.between(0, len(astray) - 1)
            files[here] = draw.fork(f"old: {astray[turn]}", f"next: {following}")
            detour = (*(f"cat {file}" for file in astray[turn:]), f"echo {decoy_code} > answer.txt")
            taken.append(Step(f"cat {following}", detours=(detour,)))
        instruction = f"Follow the hints from {path[0]}. Write the code to answer.txt."
        return Draft(instruction, files, (*taken, write), checks)


class ExtractLogs(Family):
    """A job's lines in one log name the job and the log to look at next: after `ok`, not after `err`."""

    name = "extract_logs"

    def build(self, draw: Draw, steps: int) -> Draft:
        code, failed_code, decoy_code = draw.code(), draw.code(), draw.code()
        write = Step(f"echo {code} > answer.txt", acts=True, swaps=(f"echo {failed_code} > answer.txt",))
        checks = (answered(code),)
        if steps == 1:
            seen = draw.fork(f"err {failed_code}", f"ok {code}")
            return Draft(inline("Write the ok code to answer.txt.", seen), {}, (write,), checks)
        reads = steps - 1
        # Neighbours lie in different logs, so that a search never finds the line that pointed to what it looks for.
        logs, dead_logs = draw.words(3), draw.words(2)
        path = [f"{job} {logs[i % 3]}.log" for i, job in enumerate(draw.words(reads))]
        astray = [f"{job} {dead_logs[i % 2]}.log" for i, job in enumerate(draw.words(min(reads, 3)))]
        lines: dict[str, list[str]] = {}

        def record(place: str, wrong: str, right: str) -> None:
            job, log = place.split()
            lines.setdefault(log, []).append(draw.fork(f"{job} err {wrong}", f"{job} ok {right}"))

        taken = [Step(f"grep {path[0]}")]
        record(path[-1], failed_code, code)
        record(astray[-1], failed_code, decoy_code)
        for here, following in pairwise(astray):
            record(here, draw.code(), following)
        for here, following in pairwise(path):
            turn = draw.between(0, len(astray) - 1)
            record(here, astray[turn], following)
            detour = (*(f"grep {place}" for place in astray[turn:]), f"echo {decoy_code} > answer.txt")
            taken.append(Step(f"grep {following}", detours=(detour,)))
        files = {log: "\n".join(draw.shuffled(records)) for log, records in lines.items()}
        job, log = path[0].split()
        instruction = f"Trace job {job} from {log}. Write its ok code to answer.txt."
        return Draft(instruction, files, (*taken, write), checks)


class EditConfig(Family):
    """The same keys stand in several files; pointers tell which one is in use."""

    name = "edit_config"
    keys = ("port", "rate", "size", "level", "width", "depth", "limit", "cache")

    def build(self, draw: Draw, steps: int) -> Draft:
        reads, items = split_steps(draw, steps, most_items=5)
        pointers = [f"{word}.conf" for word in draw.words(reads)]
        target = f"{draw.word()}.conf"
        olds = [f"{word}.conf" for word in draw.words(max(1, reads))]
        keys = draw.shuffled(self.keys)[: items + 1]
        before, after = {key: draw.code() for key in keys}, {key: draw.code() for key in keys[:items]}
        wanted = " ".join(f"{key}={value}" for key, value in after.items())

        def text(values: dict[str, str]) -> str:
            return "\n".join(f"{key}={value}" for key, value in values.items())

        def edits(file: str) -> tuple[str, ...]:
            return tuple(f"sed -i s/{key}=.*/{key}={value}/ {file}" for key, value in after.items())

        files = {target: text(before)} | {old: text({key: draw.code() for key in keys}) for old in olds}
        checks = (hold({target: text(before | after)} | {old: files[old] for old in olds}),)
        last = draw.fork(f"old: {olds[-1]}", f"use: {target}")
        acts = [
            Step(edit, acts=True, item=number, swaps=(wrong,))
            for number, (edit, wrong) in enumerate(zip(edits(target), edits(olds[-1]), strict=True))
        ]
        if reads == 0:
            return Draft(inline(f"Set {wanted} in the config in use.", last), files, tuple(acts), checks)
        taken = [Step(f"cat {pointers[0]}")]
        for here, following, old in zip(pointers, pointers[1:], olds, strict=False):
            files[here] = draw.fork(f"old: {old}", f"next: {following}")
            taken.append(Step(f"cat {following}", detours=((f"cat {old}", *edits(old)),)))
        files[pointers[-1]] = last
        acts[0] = Step(acts[0].command, acts=True, item=0, detours=(edits(olds[-1]),))
        instruction = f"Set {wanted} in the config in use, from {pointers[0]}."
        return Draft(instruction, files, (*taken, *acts), checks)


class RepairPermissions(Family):
    """A list of modes, an old and a new one a file; the new ones are wanted."""

    name = "repair_permissions"

    def build(self, draw: Draw, steps: int) -> Draft:
        def mode() -> str:
            while (value := f"{draw.between(4, 7)}{draw.between(0, 7)}{draw.between(0, 7)}") == "644":
                pass
            return value

        def make(count: int) -> Listing:
            listing = Listing("", [])
            rows, modes = [], {}
            for number, name in enumerate(f"{word}.sh" for word in draw.words(count)):
                new = mode()
                while (old := mode()) == new:
                    pass
                rows.append(f"{draw.fork(f'old {old}', f'new {new}', ' ')} {name}")
                wrong = (f"chmod {old} {name}",)
                listing.steps.append(Step(f"chmod {new} {name}", acts=True, item=number, swaps=wrong))
                listing.files[name] = f"echo {draw.code()}"
                modes[name] = new
            listing.checks = [prints(f"stat -c %a {' '.join(modes)}", list(modes.values()))]
            listing.text = "\n".join(rows)
            return listing

        return trail(draw, steps, lambda start: f"Set the new modes{start and f' from {start}'}.", make, ".txt", 5)


class MakeLinks(Family):
    """A list of links, each with an old and a new target."""

    name = "make_links"

    def build(self, draw: Draw, steps: int) -> Draft:
        def make(count: int) -> Listing:
            listing = Listing("", [])
            rows, targets = [], {}
            for number, link in enumerate(draw.words(count)):
                old, new = (f"{word}.txt" for word in draw.words(2))
                rows.append(f"link {link} {draw.fork(f'old {old}', f'new {new}', ' ')}")
                wrong = (f"ln -s {old} {link}",)
                listing.steps.append(Step(f"ln -s {new} {link}", acts=True, item=number, swaps=wrong))
                listing.files |= {old: draw.code(), new: draw.code()}
                targets[link] = new
            listing.checks = [prints(f"readlink {' '.join(targets)}", list(targets.values()))]
            listing.text = "\n".join(rows)
            return listing

        return trail(draw, steps, lambda start: f"Make the new links{start and f' from {start}'}.", make, ".txt", 4)


def _two_lists(draw: Draw, wrong: list[str], right: list[str]) -> str:
    return draw.fork(f"old: {' '.join(wrong)}", f"new: {' '.join(right)}")


class CountMatches(Family):
    """Count the lines of a log that hold each word of a list; an old list stands beside the new one."""

    name = "count_matches"

    def build(self, draw: Draw, steps: int) -> Draft:
        log = f"{draw.word()}.log"
        lines: dict[str, int] = {}

        def make(count: int) -> Listing:
            words, olds = draw.words(count), draw.words(min(count, 2))
            # Few words get high counts: the answer has to hold enough bits not to be guessed. No count comes twice.
            free = [times for times in range(5, 30 + 150 // count) if times not in lines.values()]
            counts = dict(zip(words + olds, draw.random.sample(free, len(words + olds)), strict=True))
            lines.update(counts)
            steps = [Step(f"grep -c {word} {log} >> answer.txt", acts=True, item=i) for i, word in enumerate(words)]
            detour = tuple(f"grep -c {word} {log} >> answer.txt" for word in olds)
            steps[0] = Step(steps[0].command, acts=True, item=0, detours=(detour,))
            answer = "\n".join(str(counts[word]) for word in words)
            return Listing(_two_lists(draw, olds, words), steps, {}, [answered(answer)])

        def ask(start: str) -> str:
            return f"Count each new word{start and f' of {start}'} in {log} into answer.txt."

        draft = trail(draw, steps, ask, make, ".txt", 8)
        draft.files[log] = "\n".join(draw.shuffled([word for word, times in lines.items() for _ in range(times)]))
        return draft


class BuildArchive(Family):
    """Put the new files of a list into a tar archive, and no others."""

    name = "build_archive"

    def build(self, draw: Draw, steps: int) -> Draft:
        def make(count: int) -> Listing:
            names = [f"{word}.txt" for word in draw.words(count)]
            olds = [f"{word}.txt" for word in draw.words(min(count, 2))]
            files = {name: draw.code() for name in names + olds}
            steps = [Step(f"tar -rf out.tar {name}", acts=True, item=i) for i, name in enumerate(names)]
            detour = tuple(f"tar -rf out.tar {name}" for name in olds)
            steps[0] = Step(steps[0].command, acts=True, item=0, detours=(detour,))
            listed, contents = "\n".join(sorted(names)), "\n".join(sorted(files[name] for name in names))
            checks = [
                "[ -f out.tar ]",
                f"[ \"$(tar -tf out.tar | sort)\" = '{listed}' ]",
                f"[ \"$(tar -xOf out.tar | sort)\" = '{contents}' ]",
            ]
            return Listing(_two_lists(draw, olds, names), steps, files, checks)

        def ask(start: str) -> str:
            return f"Add the new files{start and f' of {start}'} to out.tar."

        return trail(draw, steps, ask, make, ".txt", 8)
