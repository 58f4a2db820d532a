"""Reads a run directory for its report. A run in its first minutes has few of the files: what is missing is left out,
what cannot be read is noted, and nothing here raises for the content of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rome.training.tracking import read_metrics
from rome.trajectory import Chunk, Observation, Trajectory, load_trajectories

Record = Mapping[str, Any]
Decode = Callable[[Sequence[int]], str]


@dataclass
class Run:
    """What a run directory holds. `steps`: one entry a trajectory file shown, as plain JSON values for the viewer."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    result: Any = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(directory: Path, decode: Decode | None, max_steps: int, max_trajectories: int) -> Run:
    """Reads config, metrics, result and a selection of the trajectories (see `_pick_steps`, `_pick`)."""
    run = Run(directory)
    config = _read_json(directory / "config.json", run.problems)
    run.config = config if isinstance(config, dict) else {}
    run.records = _read_records(directory, run.problems)
    run.result = _read_json(directory / "result.json", run.problems)
    for path in _pick_steps(sorted((directory / "trajectories").glob("step_*.msgpack")), max_steps):
        step = _read_step(path, decode, max_trajectories, run.problems)
        if step is not None:
            run.steps.append(step)
    return run


def _read_json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {error}")
        return None


def _read_records(directory: Path, problems: list[str]) -> list[Record]:
    try:
        return list(read_metrics(directory / "metrics.jsonl", problems))
    except OSError as error:
        problems.append(f"metrics.jsonl: {error}")
        return []


def _pick_steps(paths: Sequence[Path], count: int) -> list[Path]:
    """The first, the last, and evenly spaced ones between."""
    if len(paths) <= count:
        return list(paths)
    spacing = (len(paths) - 1) / max(count - 1, 1)
    return [paths[i] for i in sorted({len(paths) - 1 - round(k * spacing) for k in range(count)})]


def _read_step(path: Path, decode: Decode | None, count: int, problems: list[str]) -> dict[str, Any] | None:
    try:
        trajectories = load_trajectories(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {error}")
        return None
    sidecar = _read_json(path.with_suffix(".json"), problems)
    notes = sidecar if isinstance(sidecar, dict) else {}
    shown = _pick(trajectories, count)
    try:
        values = [_trajectory(trajectory, notes.get(trajectory.id), decode) for trajectory in shown]
    except ValueError as error:  # tokens that this tokenizer does not have
        problems.append(f"{path.name}: cannot decode its tokens: {error}")
        values = [_trajectory(trajectory, notes.get(trajectory.id), None) for trajectory in shown]
    digits = path.stem.removeprefix("step_")
    return {
        "step": int(digits) if digits.isdigit() else digits,
        "total": len(trajectories),
        "successes": sum(trajectory.succeeded for trajectory in trajectories),
        "trajectories": values,
    }


def _pick(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """At most `count`, in their order; failures and successes get an equal share where both have enough."""
    won = [i for i, trajectory in enumerate(trajectories) if trajectory.succeeded]
    lost = [i for i, trajectory in enumerate(trajectories) if not trajectory.succeeded]
    few = min(len(won), len(lost), count // 2)
    keep_won = won[: count - few] if len(won) >= len(lost) else won[:few]
    keep_lost = lost[: count - len(keep_won)]
    return [trajectories[i] for i in sorted(keep_won + keep_lost)]


def _trajectory(trajectory: Trajectory, notes: Any, decode: Decode | None) -> dict[str, Any]:
    notes = notes if isinstance(notes, dict) else {}
    task = trajectory.task
    # Texts are empty for commands that print nothing, too: only a trajectory without any text gets it from its tokens.
    context = decode if not trajectory.prompt.text else None
    return {
        "id": trajectory.id,
        "group": trajectory.group_id,
        "task": {"id": task.id, "family": task.family, "horizon": task.horizon, "instruction": task.instruction},
        "seed": trajectory.seed,
        "reward": number(trajectory.final_reward),
        "success": trajectory.succeeded,
        "status": trajectory.status.value,
        "error": trajectory.error,
        "version": trajectory.start_version,
        "prefix": trajectory.prefix_chunks,
        "positive": notes.get("positive") if isinstance(notes.get("positive"), bool) else None,
        "timings": {str(name): number(value) for name, value in trajectory.timings.items()},
        "prompt": _observation(trajectory.prompt, context),
        "chunks": [_chunk(chunk, k, trajectory, notes, decode) for k, chunk in enumerate(trajectory.chunks)],
        "observations": [_observation(observation, context) for observation in trajectory.observations],
    }


def _observation(observation: Observation, decode: Decode | None) -> dict[str, Any]:
    text = observation.text or (decode(observation.tokens.tolist()) if decode else "")
    return {"text": text, "tokens": len(observation.tokens)}


def _chunk(chunk: Chunk, k: int, trajectory: Trajectory, notes: Mapping[str, Any], decode: Decode | None) -> dict:
    ids = chunk.tokens.tolist()
    rewards = trajectory.intrinsic_rewards
    kept = _item(notes, "kept", k)
    return {
        "id": chunk.id,
        "text": chunk.text or (decode(ids) if decode else ""),
        "ids": ids,
        "pieces": token_pieces(ids, decode) if decode else None,
        "logp": [number(value) for value in chunk.behavior_logp.tolist()],
        "versions": sorted(set(chunk.versions.tolist())),
        "error": chunk.error,
        "intrinsic": number(rewards[k]) if rewards is not None else None,
        "return": number(_item(notes, "returns", k)),
        "ratio": number(_item(notes, "ratio", k)),
        "mismatch": number(_item(notes, "mismatch", k)),
        "kept": kept if isinstance(kept, bool) else None,
    }


def _item(notes: Mapping[str, Any], name: str, k: int) -> Any:
    values = notes.get(name)
    return values[k] if isinstance(values, list) and k < len(values) else None


def token_pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds. A character made of several tokens appears with the last of them."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end]).rstrip("\ufffd") if end < len(ids) else decode(ids)
        piece = text[len(shown) :] if text.startswith(shown) else ""
        pieces.append(piece)
        shown += piece
    return pieces


def number(value: Any) -> float | None:
    """A finite number to 5 significant digits, or None: what JSON can carry."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{value:.5g}") if math.isfinite(value) else None


# ---------------------------------------------------------------- what the records say


def evaluations(records: Sequence[Record]) -> list[Record]:
    """The records that hold an evaluation, in order."""
    return [record for record in records if number(record.get("eval/success")) is not None]


def before_and_after(records: Sequence[Record]) -> tuple[Record | None, Record | None]:
    """The evaluation that IPA started from (the last before its first step), and the newest; None if there is none."""
    evals = evaluations(records)
    if not evals:
        return None, None
    first_step = next((i for i, record in enumerate(records) if record["stage"] == "ipa"), len(records))
    earlier = evaluations(records[:first_step])
    return (earlier[-1] if earlier and len(evals) > len(earlier) else evals[0]), evals[-1]


def breakdown(record: Record | None, prefix: str) -> dict[str, float]:
    """`{name: success}` of the metrics `prefix/name`, in natural order."""
    found = {
        name.removeprefix(f"{prefix}/"): value
        for name, raw in (record or {}).items()
        if name.startswith(f"{prefix}/") and (value := number(raw)) is not None
    }
    return {name: found[name] for name in sorted(found, key=natural)}


def natural(name: str) -> tuple[bool, int, str]:
    """Sort key: numbers by size, before words."""
    return not name.isdigit(), int(name) if name.isdigit() else 0, name


def stage_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Wall-clock seconds by stage: the time up to each record belongs to the stage that wrote it."""
    seconds: dict[str, float] = {}
    previous = None
    for record in records:
        now = number_exact(record.get("time"))
        own = number(record.get("time/step")) or 0.0
        elapsed = own if previous is None or now is None else max(0.0, now - previous)
        seconds[record["stage"]] = seconds.get(record["stage"], 0.0) + elapsed
        previous = now if now is not None else previous
    return seconds


def number_exact(value: Any) -> float | None:
    """A finite number, unrounded, or None."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
