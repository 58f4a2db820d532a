"""What a config file says, as typed values. Every key is read; an unknown one is an error (see `config.py`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ml_collections import ConfigDict

from rome.envs import FAMILIES, HELD_OUT_FAMILIES
from rome.envs.families import MAX_HORIZON, MIN_HORIZON
from rome.ipa import ObjectiveConfig, validate_asynchrony
from rome.models import ModelConfig
from rome.models.sharding import MeshConfig
from rome.rollout import Deadlines, EngineConfig, HostConfig, RewardConfig, RolloutConfig
from rome.training.config import LAUNCH_KEYS, ConfigError, config_to_dataclass
from rome.training.policy import PolicySettings
from rome.training.resampling import ResamplingSettings
from rome.training.state import OptimizerConfig


def _at_least(section: object, **limits: float) -> None:
    for name, limit in limits.items():
        if not getattr(section, name) >= limit:
            raise ValueError(f"{name}: expected at least {limit}, found {getattr(section, name)!r}")


def _multiple(name: str, value: int, of: str, ways: int) -> None:
    if value % ways:
        raise ValueError(f"{name}: expected a multiple of {ways} (the ways in which {of} splits it), found {value}")


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
    """How many scripted episodes, which fraction is deliberately flawed, how many sandboxes at once."""

    count: int
    flawed_fraction: float
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
    """Lengths in tokens of the copy exercises' contexts and segments (continued pre-training)."""

    context: tuple[int, ...] = (4, 20)
    segment: tuple[int, ...] = (2, 6)

    def __post_init__(self) -> None:
        for name in ("context", "segment"):
            value = getattr(self, name)
            if len(value) != 2 or not 1 <= value[0] <= value[1]:
                raise ValueError(f"{name}: expected a shortest and a longest length (1 or more), found {value!r}")


@dataclass(frozen=True)
class NativeSettings:
    """Agents that are programs in the sandbox (`rollout.agent` "native"; see `rome.rollout.native`).

    Attributes:
      program: a file of this machine, which is copied into the sandbox; empty: `rome/rollout/shell_agent.py`.
      command: that starts it there; `{program}` is its path.
      seconds: it is stopped after so long, and judged. request_seconds: for one answer of the model.
      workers: rollouts at once.
    """

    program: str = ""
    command: str = "python3 {program}"
    seconds: float = 120.0
    request_seconds: float = 60.0
    workers: int = 8

    def __post_init__(self) -> None:
        _at_least(self, seconds=0.1, request_seconds=0.1, workers=1)
        if "{program}" not in self.command:
            raise ValueError(f"command: expected one that holds {{program}}, found {self.command!r}")


@dataclass(frozen=True)
class RolloutSettings:
    """Attributes:
    async_ratio: the staleness bound, 0 is synchronous.
    hosts: Ray actors that roll out, 0 is in this process; `host_*` as in `HostConfig`.
    filter_groups: how many groups a step, at most, are dropped and replaced because all of their samples have one
      reward (see `SampleBuffer`).
    agent: who acts: "loop" (this process runs the tool calls) or "native" (a program in the sandbox asks the policy).
    The rest as in `RolloutConfig`.
    """

    async_ratio: float = 0.0
    allow_unmasked: bool = False
    hosts: int = 0
    host_cpus: float = 1.0
    host_boot_seconds: float = 300.0
    host_silent_seconds: float = 120.0
    env_threads: int = 16
    max_retries: int = 3
    redundancy: int = 0
    filter_groups: int = 0
    batch_seconds: float = 600.0
    deadlines: Deadlines = field(default_factory=Deadlines)
    agent: str = "loop"
    native: NativeSettings = field(default_factory=NativeSettings)

    def __post_init__(self) -> None:
        if self.agent not in ("loop", "native"):
            raise ValueError(f"agent: expected 'loop' or 'native', found {self.agent!r}")
        _at_least(self, batch_seconds=0, hosts=0, filter_groups=0)
        self.runner()
        if self.hosts:
            self.host_config()
        if (self.hosts or self.redundancy) and self.async_ratio <= 0:
            raise ValueError(
                f"async_ratio: expected more than 0 with hosts or redundancy, found {self.async_ratio:g}: "
                "synchronous rollouts are the same every time"
            )

    def host_config(self) -> HostConfig:
        return HostConfig(self.hosts, self.host_cpus, self.host_boot_seconds, self.host_silent_seconds)

    def runner(self) -> RolloutConfig:
        return RolloutConfig(
            env_threads=self.env_threads,
            max_retries=self.max_retries,
            deadlines=self.deadlines,
            redundancy=self.redundancy,
        )


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
class PretrainedModel:
    """The section `model` of a run that starts from a published model: its folder, and how it is computed.

    The fields but `pretrained` are those of `ModelConfig` that the folder's `config.json` does not determine.
    """

    pretrained: str
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    scan_layers: bool = True
    head_chunk: int = 1024
    moe_dispatch: str = "auto"
    attention_kernel: str = "auto"
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0

    @property
    def runtime(self) -> dict[str, Any]:
        """The arguments of `rome.models.families.from_hf_config`."""
        return {name: value for name, value in asdict(self).items() if name != "pretrained"}


@dataclass(frozen=True)
class MeshSettings:
    """How training, and how rollouts, spread over the devices (`rome.models.sharding`).

    With `multiplex`, rollouts have all devices, and lend the first ones to training while it has a batch: `train` is
    then smaller than `rollout`, and the devices that it leaves are `narrow`.
    """

    train: MeshConfig = field(default_factory=MeshConfig)
    rollout: MeshConfig = field(default_factory=MeshConfig)
    multiplex: bool = False

    def __post_init__(self) -> None:
        if self.rollout.context > 1:
            raise ValueError(f"rollout.context: expected 1 (a token is decoded whole), found {self.rollout.context}")
        if not self.multiplex:
            return
        left, unit = self.rollout.size - self.train.size, self.rollout.size // self.rollout.data
        if left < 1:
            raise ValueError(
                f"multiplex: expected train to have fewer devices than rollout ({self.rollout.size}), "
                f"found {self.train.size}"
            )
        if left % unit:
            raise ValueError(
                f"multiplex: expected the devices that train leaves to be a multiple of {unit} (rollout.fsdp × expert "
                f"× tensor), found {self.rollout.size} - {self.train.size} = {left}"
            )

    @property
    def narrow(self) -> MeshConfig:
        """Of rollouts while training has its devices: with fewer ways of `data`."""
        unit = self.rollout.size // self.rollout.data
        return replace(self.rollout, data=(self.rollout.size - self.train.size) // unit)

    @property
    def rollouts(self) -> dict[str, MeshConfig]:
        """Every mesh that rollouts may have, by what it is called in messages."""
        narrow = {"mesh.rollout without mesh.train": self.narrow} if self.multiplex else {}
        return {"mesh.rollout": self.rollout, **narrow}


@dataclass(frozen=True)
class RunSettings:
    """A whole config file. `induction`: start with `rome.models.init_induction`.

    `model` has the fields of `ModelConfig`, or those of `PretrainedModel` to start from a published model.
    `vocab_size` and `digits_per_token` are those of the tokenizer that the run trains: none if it starts from such one.
    """

    name: str
    seed: int
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
    reward: RewardConfig = field(default_factory=RewardConfig)
    vocab_size: int | None = None
    digits_per_token: int | None = None
    tensorboard: bool = True
    mesh: MeshSettings = field(default_factory=MeshSettings)

    def __post_init__(self) -> None:
        _at_least(self, seed=0)
        _multiple("rl.micro_rows", self.rl.micro_rows, "mesh.train", self.mesh.train.row_shards)
        prompts = min(self.engine.prompt_rows, self.engine.slots_per_cohort)
        for name, mesh in self.mesh.rollouts.items():
            _multiple("engine slots a cohort", self.engine.slots_per_cohort, name, mesh.row_shards)
            _multiple("engine.prompt_rows", prompts, name, mesh.row_shards)
        if self.engine.page_size and (self.mesh.multiplex or self.mesh.rollout.row_shards > 1):
            raise ValueError(
                "engine.page_size: expected 0 with mesh.multiplex, or a mesh.rollout that splits slots (data, fsdp, "
                f"expert), found {self.engine.page_size}"
            )
        if self.mesh.multiplex and (self.rollout.async_ratio <= 0 or self.rollout.hosts):
            raise ValueError(
                "mesh.multiplex: expected rollout.async_ratio > 0 (rollouts go on while training has its devices) and "
                f"rollout.hosts = 0, found {self.rollout.async_ratio:g} and {self.rollout.hosts}"
            )
        if self.rollout.filter_groups and self.rl.group_size < 2:
            raise ValueError(
                "rollout.filter_groups: expected 0 with rl.group_size = 1 (a single sample never differs), "
                f"found {self.rollout.filter_groups}"
            )
        shards = self.mesh.train.context * self.mesh.train.tensor
        _multiple("rl.row_length", self.rl.row_length, "mesh.train context × tensor", shards)
        if self.rl.max_chunks < self.environment.max_chunks:
            raise ValueError(
                f"rl.max_chunks: expected at least environment.max_chunks = {self.environment.max_chunks}, "
                f"found {self.rl.max_chunks}"
            )
        if self.rl.router_replay and not self.engine.record_experts:
            raise ValueError("rl.router_replay: expected engine.record_experts to be True too, found False")
        if self.rollout.agent == "native":
            self._check_native()
        own = {"vocab_size": self.vocab_size, "digits_per_token": self.digits_per_token}
        for name, value in own.items():
            if (value is None) != self.starts_pretrained:
                expected = "none with model.pretrained" if self.starts_pretrained else "an integer"
                raise ValueError(f"{name}: expected {expected}, found {value!r}")
        if self.starts_pretrained and self.induction:
            raise ValueError("induction: expected False with model.pretrained, found True")
        if self.engine.record_experts and not self.starts_pretrained and not self.model.get("num_experts"):
            raise ValueError("engine.record_experts: expected model.num_experts > 0, found a dense model")

        experts = self.resampling.fraction > 0 and self.resampling.source == "demonstration"
        if self.ipa.imitation != "off" and not experts:
            raise ValueError(
                "ipa.imitation: expected off, or resampling.fraction > 0 from demonstrations (there is nobody else to "
                f"imitate), found {self.ipa.imitation!r}"
            )

    def _check_native(self) -> None:
        """What an agent that is a program of its own can't be combined with."""
        needed = {
            "rollout.async_ratio": (self.rollout.async_ratio, 0),
            "rollout.hosts": (self.rollout.hosts, 0),
            "mesh.rollout's devices": (self.mesh.rollout.size, 1),
            "resampling.fraction": (self.resampling.fraction, 0),
            "engine.record_experts": (self.engine.record_experts, False),
            "engine.page_size": (self.engine.page_size, 0),
            "reward": ("the verifier's alone" if self.reward.is_verifier_alone else "a mix", "the verifier's alone"),
            "model.pretrained": (self.model.get("pretrained"), None),
        }
        for name, (found, expected) in needed.items():
            if found != expected:
                raise ValueError(f"{name}: expected {expected} with rollout.agent = 'native', found {found}")

    @property
    def starts_pretrained(self) -> bool:
        return "pretrained" in self.model

    @cached_property
    def pretrained(self) -> PretrainedModel | None:
        """Which published model the run starts from, if it does. Raises ConfigError, naming the key."""
        return config_to_dataclass(PretrainedModel, self.model, "model") if self.starts_pretrained else None

    def optimizer_of(self, stage: str) -> tuple[OptimizerConfig, int]:
        """The optimizer of a stage, and its number of updates."""
        if stage == "ipa":
            return self.rl.optimizer, self.rl.steps * self.rl.updates_per_batch
        section: SupervisedSettings = getattr(self, stage)
        return section.optimizer, section.steps

    def model_config(self, vocab_size: int) -> ModelConfig:
        """A model from nothing, with the vocabulary that its tokenizer really has."""
        return config_to_dataclass(ModelConfig, {**self.model, "vocab_size": vocab_size}, "model")


def load_settings(config: ConfigDict) -> RunSettings:
    """The typed settings of a config. Raises ConfigError, naming the key, before anything runs."""
    plain = {key: value for key, value in config.items() if key not in LAUNCH_KEYS}
    model = dict(plain.pop("model", {}))
    settings = config_to_dataclass(RunSettings, {**plain, "model": model}, "config")
    if settings.pretrained is None:
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
