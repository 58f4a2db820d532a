"""What rolls out: environments, engine and runner of a run's settings, in this process or in a rollout host."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rome.envs import TerminalEnv
from rome.models import ChatRenderer, ModelConfig, Renderer, TemplateRenderer, Tokenizer
from rome.models.lora import Adapted
from rome.rollout import DecodeEngine, RewardStage, RolloutRunner, shell_agent
from rome.rollout.stream import StreamConfig, StreamEngine
from rome.rollout.sync import AdapterMerger
from rome.training.config import ConfigError
from rome.training.memory import keep_freed_memory
from rome.training.platform import make_meshes
from rome.training.pretrained import kept_tokenizer
from rome.training.settings import RunSettings

if TYPE_CHECKING:
    from rome.rollout.native import NativeRollouts

_AGENT = "/tmp/agent"  # of the sandbox, where an agent that is a program lies


def make_environment(settings: RunSettings) -> TerminalEnv:
    """A fresh environment."""
    e = settings.environment
    return TerminalEnv(
        max_chunks=e.max_chunks,
        max_observation_chars=e.max_observation_chars,
        command_seconds=e.command_seconds,
    )


def make_renderer(tokenizer: Any) -> Renderer:
    """Our own chat format for a tokenizer that a run trained, a published model's template for its own."""
    return ChatRenderer(tokenizer) if isinstance(tokenizer, Tokenizer) else TemplateRenderer(tokenizer)


def make_rewards(settings: RunSettings) -> RewardStage | None:
    """The reward stage, if rewards are more than the verifier's. Raises ConfigError for a judge without its key."""
    if settings.reward.is_verifier_alone:
        return None
    try:
        return RewardStage(settings.reward)
    except ValueError as error:
        raise ConfigError(f"config.reward.{error}") from error


def _native_runner(
    settings: RunSettings,
    model: ModelConfig,
    renderer: Renderer,
    params: Any,
    version: int,
    merger: AdapterMerger | None,
) -> NativeRollouts:
    """Rollouts of a program in the sandbox, whose engine is warm. Raises ConfigError for what is missing."""
    try:
        from rome.rollout.native import NativeConfig, NativeRollouts
        from rome.rollout.service import RomeChat, Scheduler
    except ImportError as error:
        raise ConfigError(f"config.rollout.agent: 'native' needs the extra 'serve': {error}") from error
    s, native, drawn = settings, settings.rollout.native, settings.engine
    source = Path(native.program or shell_agent.__file__)
    try:
        program = source.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"config.rollout.native.program: expected a text file, found {source}: {error}") from error
    config = NativeConfig(
        program={_AGENT: program},
        command=native.command.format(program=_AGENT),
        variables={
            "ROME_MAX_TURNS": str(s.environment.max_chunks),
            "ROME_MAX_OUTPUT": str(s.environment.max_observation_chars),
            "ROME_COMMAND_SECONDS": str(s.environment.command_seconds),
        },
        agent_seconds=native.seconds,
        request_seconds=native.request_seconds,
        max_requests=s.environment.max_chunks,
        max_tokens=drawn.max_chunk_tokens,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        min_p=drawn.min_p,
        workers=native.workers,
        max_retries=s.rollout.max_retries,
    )
    shapes = StreamConfig(drawn.slots, drawn.max_length, drawn.extend_buckets, alternatives=1)
    engine = StreamEngine(params, model, shapes, renderer.stop_ids, renderer.tokenizer.pad_id, version)
    engine.warmup()
    scheduler = Scheduler(engine, queue_limit=native.workers * s.environment.max_chunks)
    return NativeRollouts(scheduler, renderer, RomeChat(renderer), config, merger)


def make_runner(
    settings: RunSettings, model: ModelConfig, renderer: Renderer, params: Any, version: int, keeps_base: bool = True
) -> RolloutRunner | NativeRollouts:
    """A runner whose engine is warm. `params`: plain, or `Adapted` ones, whose base it keeps or borrows."""
    meshes, merger = make_meshes(settings.mesh).rollout, None
    if isinstance(params, Adapted):
        merger = AdapterMerger(params, model, meshes[-1], keeps_base)
        params = merger(params)
    if settings.rollout.agent == "native":
        return _native_runner(settings, model, renderer, params, version, merger)
    engine = DecodeEngine(
        params,
        model,
        settings.engine,
        renderer.stop_ids,
        renderer.tokenizer.pad_id,
        version=version,
        meshes=meshes,
    )
    engine.warmup()
    environment = functools.partial(make_environment, settings)
    return RolloutRunner(engine, renderer, environment, settings.rollout.runner(), make_rewards(settings), merger)


def host_runner(settings: RunSettings, directory: str, model: ModelConfig, params: Any, version: int) -> RolloutRunner:
    """The same in a process of its own, that sees the run's directory (it holds the tokenizer)."""
    keep_freed_memory()
    return make_runner(settings, model, make_renderer(kept_tokenizer(Path(directory))), params, version)
