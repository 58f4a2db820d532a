"""The main job made as small as it goes: a config file for `experiments/ipa_train.py`, two families, seconds a run."""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_MAIN_JOB = Path(__file__).parents[2] / "configs" / "rome_tiny.py"


def get_config() -> ConfigDict:
    """`configs/rome_tiny.py` with everything that takes time made small; its keys are the main job's."""
    config = runpy.run_path(str(_MAIN_JOB))["get_config"]()
    config.update(
        name="tiny_run",
        vocab_size=512,
        tensorboard=False,
        model={
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "num_experts": 0,
            "num_experts_per_token": 0,
            "moe_intermediate_size": 0,
            "scan_layers": True,
        },
        tasks={"families": ("follow_hints", "count_matches"), "horizons": (2, 3), "held_out": ()},
        environment={"max_chunks": 5},
        demonstrations={"count": 24, "workers": 4},
        cpt={"steps": 4, "rows": 8, "row_length": 64, "log_every": 1},
        sft={"steps": 24, "rows": 8, "row_length": 256, "log_every": 4, "optimizer": {"warmup_steps": 2}},
        rl={"steps": 4, "groups": 2, "group_size": 2, "row_length": 192, "micro_rows": 2, "save_every": 2},
        engine={
            "slots": 8,
            "cohorts": 2,
            "max_length": 192,
            "extend_buckets": (16, 96),
            "max_chunk_tokens": 12,
        },
        rollout={"env_threads": 4, "async_ratio": 0.0},
        ipa={"failure_reward": -1.0},  # so young a policy never succeeds: this gives it something to learn
        evaluation={"tasks": 4, "samples": 1, "every": 0},
        checkpoint={"supervised_every": 8, "every": 2, "keep": 2},
    )
    return config
