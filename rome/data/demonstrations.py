"""Demonstrations: scripted experts act in real sandboxes, some of them deliberately flawed.

An episode is text first (what the expert typed, what the sandbox answered), so that a tokenizer can be trained on it;
then it becomes a Trajectory like any other, with the runtime's error flags that the SFT objective masks by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from rome.data.sampler import TaskSpec
from rome.envs import EnvFailure, HarborTask, TerminalEnv, draft_task, expert_actions
from rome.models import Message, Renderer
from rome.trajectory import Chunk, Observation, Status, Task, Trajectory


@dataclass(frozen=True)
class Episode:
    """`actions[k]` is a shell command, or None for the final stop; `outputs[k]` and `errors[k]` answer it."""

    task: Task
    actions: tuple[str | None, ...]
    outputs: tuple[str, ...]
    errors: tuple[bool, ...]
    reward: float
    status: Status
    flawed: bool

    def texts(self) -> Iterator[str]:
        """Everything a tokenizer should know: instruction, commands, outputs."""
        yield self.task.instruction
        yield from (action for action in self.actions if action)
        yield from (output for output in self.outputs if output)


def _play(env: TerminalEnv, task: HarborTask, actions: Sequence[str | None], seed: int, flawed: bool) -> Episode:
    env.reset(seed=seed, options={"task": task})
    outputs, errors, reward, info = [], [], 0.0, {}
    taken: list[str | None] = []
    for action in actions:
        output, reward, terminated, truncated, info = env.step(
            "" if action is None else f"<tool_call>{action}</tool_call>"
        )
        taken.append(action)
        outputs.append(output)
        errors.append(bool(info.get("error", False)))
        if terminated or truncated:
            break
    return Episode(
        task.task, tuple(taken), tuple(outputs), tuple(errors), float(reward), Status(info["status"]), flawed
    )


def collect_episodes(
    specs: Sequence[TaskSpec],
    flawed_fraction: float,
    seed: int,
    env_factory: Callable[[], TerminalEnv],
    workers: int = 8,
    on_episode: Callable[[int], None] | None = None,
    attempts: int = 3,
) -> list[Episode]:
    """One episode a task spec, in order, the same for the same seed whatever the number of workers.

    Whether episode i is flawed is drawn from (seed, i). An infrastructure failure is tried again, `attempts` times;
    then EnvFailure is raised.
    """

    def one(index: int) -> Episode:
        spec = specs[index]
        rng = np.random.default_rng([seed, index])
        flawed = bool(rng.random() < flawed_fraction)
        expert_seed = int(rng.integers(2**31))
        task = draft_task(spec.family, spec.seed, spec.horizon)
        actions = expert_actions(task, expert_seed, flawed)
        for attempt in range(attempts):
            env = env_factory()
            try:
                return _play(env, task, actions, expert_seed, flawed)
            except EnvFailure:
                if attempt == attempts - 1:
                    raise
            finally:
                env.close()
        raise AssertionError("unreachable: the loop returns or raises")

    episodes = []
    with ThreadPoolExecutor(workers, thread_name_prefix="demonstrations") as pool:
        try:
            for episode in pool.map(one, range(len(specs))):
                episodes.append(episode)
                if on_episode:
                    on_episode(len(episodes))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return episodes


def tokenize_episodes(episodes: Sequence[Episode], renderer: Renderer) -> list[Trajectory]:
    """The episodes as trajectories (behavior_logp 0, version −1: nobody sampled these tokens)."""
    return [_tokenize(f"demo-{number}", episode, renderer) for number, episode in enumerate(episodes)]


def relabel(demonstration: Trajectory, mapping: Callable[[str], str], renderer: Renderer) -> Trajectory:
    """A demonstration of `tokenize_episodes` with every text mapped (see `relabelling`) and tokenized again."""
    t = demonstration
    outputs = [mapping(observation.text) for observation in t.observations]
    episode = Episode(
        task=replace(t.task, instruction=mapping(t.task.instruction)),
        actions=tuple(mapping(chunk.text) or None for chunk in t.chunks),
        outputs=(*outputs, *[""] * (len(t.chunks) - len(outputs))),
        errors=tuple(chunk.error for chunk in t.chunks),
        reward=float(t.final_reward or 0.0),
        status=t.status,
        flawed=not t.succeeded,
    )
    return _tokenize(t.id, episode, renderer)


def _tokenize(name: str, episode: Episode, renderer: Renderer) -> Trajectory:
    chunks, observations = [], []
    for k, (action, output) in enumerate(zip(episode.actions, episode.outputs, strict=True)):
        tokens = np.array(renderer.chunk(action), np.int32)
        zeros = np.zeros(len(tokens), np.float32)
        versions = np.full(len(tokens), -1, np.int32)
        chunks.append(Chunk(f"{name}/{k}", tokens, zeros, versions, action or "", error=episode.errors[k]))
        if k < len(episode.actions) - 1:
            delta = renderer.observation([Message("tool", output)])
            observations.append(Observation(np.array(delta, np.int32), output))
    prompt = renderer.prompt([Message("user", episode.task.instruction)])
    return Trajectory(
        id=name,
        group_id=name,
        task=episode.task,
        seed=episode.task.seed,
        prompt=Observation(np.array(prompt, np.int32), episode.task.instruction),
        chunks=tuple(chunks),
        observations=tuple(observations),
        final_reward=episode.reward,
        status=episode.status,
        start_version=-1,
    )
