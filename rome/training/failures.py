"""What can end a run that is nobody's bug: told in one line instead of a traceback."""

from rock_env import RockError
from rome.envs import EnvFailure
from rome.models import ConfigError as ModelConfigError
from rome.models import TokenizerError
from rome.models.sharding import ShardingError
from rome.models.weights import WeightsError
from rome.rollout import EngineError, HostsLost, SampleBufferError
from rome.training.checkpoint import CheckpointError
from rome.training.config import ConfigError
from rome.training.packing import PackingError
from rome.training.rl import RolloutsFailed
from rome.training.tracking import MetricsError
from rome.trajectory import TrajectoryError

EXPECTED_FAILURES: tuple[type[Exception], ...] = (
    CheckpointError,
    ConfigError,
    EngineError,
    EnvFailure,
    HostsLost,
    MetricsError,
    ModelConfigError,
    OSError,  # a full disk, a missing permission
    PackingError,
    RockError,  # no bwrap, limits that this machine can't enforce, a malformed task folder
    RolloutsFailed,
    SampleBufferError,
    ShardingError,
    TokenizerError,
    TrajectoryError,
    WeightsError,
)
"""Typed errors whose message says what is wrong and what to do about it."""
