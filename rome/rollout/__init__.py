"""Rollouts: the decode engine, the token ledger, the runner that keeps many environments in flight, and the buffer.

Read `runner.py` for the loop, `episode.py` for the life of one trajectory, `engine.py` for how tokens are sampled.
"""

from rome.rollout.background import BackgroundRollouts, RolloutStopped
from rome.rollout.buffer import BufferClosed, BufferStats, BufferTimeout, SampleBuffer, SampleBufferError
from rome.rollout.engine import DecodeEngine, EngineConfig, EngineError, EngineStats, Finish, Sampled
from rome.rollout.episode import ChunkEnv, Deadlines, GroupRequest
from rome.rollout.hosts import HostConfig, HostedRollouts, HostPool, HostsLost, RolloutTotals
from rome.rollout.ledger import LedgerError, TokenLedger
from rome.rollout.rewards import JudgeConfig, RewardConfig, RewardFailure, RewardStage
from rome.rollout.runner import GroupDropped, RolloutConfig, RolloutRunner, RolloutStats
from rome.rollout.trace import Trace
from rome.rollout.tree import MessageTree, Turn

__all__ = [
    "BackgroundRollouts",
    "BufferClosed",
    "BufferStats",
    "BufferTimeout",
    "ChunkEnv",
    "Deadlines",
    "DecodeEngine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "Finish",
    "GroupDropped",
    "GroupRequest",
    "HostConfig",
    "HostPool",
    "HostedRollouts",
    "HostsLost",
    "JudgeConfig",
    "LedgerError",
    "MessageTree",
    "RewardConfig",
    "RewardFailure",
    "RewardStage",
    "RolloutConfig",
    "RolloutRunner",
    "RolloutStats",
    "RolloutStopped",
    "RolloutTotals",
    "SampleBuffer",
    "SampleBufferError",
    "Sampled",
    "TokenLedger",
    "Trace",
    "Turn",
]
