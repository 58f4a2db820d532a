"""What a config file says, as typed values. Every key is read; an unknown one is an error (see `config.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from rome.envs import FAMILIES, HELD_OUT_FAMILIES
from rome.envs.families import MAX_HORIZON, MIN_HORIZON
from rome.ipa import ObjectiveConfig, validate_asynchrony
from rome.models import ModelConfig
from rome.rollout import Deadlines, EngineConfig, RolloutConfig
from rome.training.config import LAUNCH_KEYS, ConfigError, config_to_dataclass
from rome.training.policy import PolicySettings
from rome.training.resampling import ResamplingSettings
from rome.training.state import OptimizerConfig


def _at_least(section: object, **limits: float) -> None:
    for name, limit in limits.items():
        if not getattr(section, name) >= limit:
            raise ValueError(f"{name}: expected at least {limit}, found {getattr(section, name)!r}")


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks to train and evaluate on. `focus`, `floor`: see `TaskSampler`; `held_out`: families never trained."""

    families: tuple[str, ...]
    horizons: tuple[int, ...]
    held_out: tuple[str, ...] = ()
    focus: float = 1.0
    floor: float = 0.35

    def __post_init__(self) -> None:
        unknown = sorted((set(self.families) | set(self.held_out)) - set(FAMILIES) - set(HELD_OUT_FAMILIES))
        if unknown or not self.families:
            raise ValueError(f"families, held_out: expected some of {[*FAMILIES, *HELD_OUT_FAMILIES]}, found {unknown}")
        if set(self.families) & set(self.held_out):
            raise ValueError(f"held_out: {sorted(set(self.families) & set(self.held_out))} are trained on")
        if not self.horizons or not all(MIN_HORIZON <= h <= MAX_HORIZON for h in self.horizons):
            raise ValueError(f"horizons: expected values in {MIN_HORIZON}..{MAX_HORIZON}, found {self.horizons}")


@dataclass(frozen=True)
class EnvironmentSettings:
    """Of every episode: chunks before truncation, characters of an observation, seconds of a command."""

    max_chunks: int
    max_observation_chars: int = 256
    command_seconds: float = 5.0

    def __post_init__(self) -> None:
        _at_least(self, max_chunks=1, max_observation_chars=16, command_seconds=0.1)


@dataclass(frozen=True)
class DemonstrationSettings:
    """How many scripted episodes, which fraction is deliberately flawed, how many sandboxes at once.

    balance_chunks: draw short tasks more often, so that every horizon has as many chunks to learn from.
    """

    count: int
    flawed_fraction: float
    balance_chunks: bool = False
    workers: int = 8

    def __post_init__(self) -> None:
        _at_least(self, count=1, workers=1)
        if not 0 <= self.flawed_fraction <= 1:
            raise ValueError(f"flawed_fraction: expected a fraction in [0, 1], found {self.flawed_fraction!r}")


@dataclass(frozen=True)
class SupervisedSettings:
    """A supervised stage: updates, rows and row length of a batch, steps between metric records, optimizer."""

    steps: int
    rows: int
    row_length: int
    optimizer: OptimizerConfig
    log_every: int = 10

    def __post_init__(self) -> None:
        _at_least(self, steps=0, rows=1, row_length=2, log_every=1)


@dataclass(frozen=True)
class CopySettings:
    """Copy exercises (continued pre-training): shortest and longest contexts and segments, in tokens, and how many
    different tokens an exercise is made of (None: the whole vocabulary); see `rome.data.copying`."""

    context: tuple[int, ...] = (4, 20)
    segment: tuple[int, ...] = (2, 6)
    alphabet: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("context", "segment", "alphabet"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not 1 <= value[0] <= value[1]):
                raise ValueError(f"{name}: expected a least and a greatest number (1 or more), found {value!r}")


@dataclass(frozen=True)
class RolloutSettings:
    """`async_ratio`: the staleness bound, 0 is synchronous; the rest as in `RolloutConfig`."""

    async_ratio: float = 0.0
    allow_unmasked: bool = False
    env_threads: int = 16
    max_retries: int = 3
    batch_seconds: float = 600.0
    deadlines: Deadlines = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        _at_least(self, batch_seconds=0)
        self.runner()

    def runner(self) -> RolloutConfig:
        return RolloutConfig(env_threads=self.env_threads, max_retries=self.max_retries, deadlines=self.deadlines)


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out tasks × samples a task (avg@k); `every` IPA steps a smaller one of `tasks_during` tasks, 0 for none."""

    tasks: int
    samples: int = 3
    every: int = 0
    tasks_during: int = 30
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, tasks=1, samples=1, every=0, tasks_during=1, temperature=0)


@dataclass(frozen=True)
class CheckpointSettings:
    """Steps between checkpoints in the supervised stages and in IPA; how many are kept."""

    supervised_every: int = 100
    every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least(self, supervised_every=1, every=1, keep=1)


@dataclass(frozen=True)
class RunSettings:
    """A whole config file. `induction`: start with `rome.models.init_induction`."""

    name: str
    seed: int
    vocab_size: int
    digits_per_token: int
    model: dict[str, Any]
    induction: bool
    tasks: TaskSettings
    environment: EnvironmentSettings
    demonstrations: DemonstrationSettings
    copying: CopySettings
    cpt: SupervisedSettings
    sft: SupervisedSettings
    ipa: ObjectiveConfig
    rl: PolicySettings
    engine: EngineConfig
    rollout: RolloutSettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    resampling: ResamplingSettings = field(default_factory=ResamplingSettings)
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _at_least(self, seed=0)
        if self.rl.max_chunks < self.environment.max_chunks:
            raise ValueError(
                f"rl.max_chunks: expected at least environment.max_chunks = {self.environment.max_chunks}, "
                f"found {self.rl.max_chunks}"
            )
        if self.rl.router_replay and not self.engine.record_experts:
            raise ValueError("rl.router_replay: expected engine.record_experts to be True too, found False")
        if self.engine.record_experts and not self.model.get("num_experts"):
            raise ValueError("engine.record_experts: expected model.num_experts > 0, found a dense model")

        experts = self.resampling.fraction > 0 and self.resampling.source == "demonstration"
        if self.ipa.imitation != "off" and not experts:
            raise ValueError(
                "ipa.imitation: expected off, or resampling.fraction > 0 from demonstrations (there is nobody else to "
                f"imitate), found {self.ipa.imitation!r}"
            )

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model with the vocabulary that its tokenizer really has."""
        return config_to_dataclass(ModelConfig, {**self.model, "vocab_size": vocab_size}, "model")


def load_settings(config: ConfigDict) -> RunSettings:
    """The typed settings of a config. Raises ConfigError, naming the key, before anything runs."""
    plain = {key: value for key, value in config.items() if key not in LAUNCH_KEYS}
    model = dict(plain.pop("model", {}))
    settings = config_to_dataclass(RunSettings, {**plain, "model": model}, "config")
    settings.model_config(settings.vocab_size)
    try:
        validate_asynchrony(settings.ipa, settings.rollout.async_ratio, settings.rollout.allow_unmasked)
    except ValueError as error:
        raise ConfigError(f"config.ipa: {error}") from error
    if settings.engine.max_length > settings.rl.row_length:
        raise ConfigError(
            f"config.engine.max_length: expected at most rl.row_length = {settings.rl.row_length}, "
            f"got {settings.engine.max_length}"
        )
    return settings
