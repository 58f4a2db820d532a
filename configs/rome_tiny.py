"""The main job: a 0.9M-parameter policy learns six families of terminal tasks from scratch, on two cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every key is read by `rome.training.settings`; override any of them as `--config.KEY=VALUE`."""
    config = ConfigDict()
    config.name = "rome_tiny"
    config.seed = 0
    config.vocab_size = 1024
    config.digits_per_token = 2
    config.tensorboard = True
    config.induction = True
    config.model = ConfigDict(
        {
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
            "intermediate_size": 384,
            "rope_theta": 1e4,
            "qk_norm_init": 1.5,
            "tie_embeddings": True,
            "scan_layers": False,
            "num_experts": 0,
            "num_experts_per_token": 0,
            "moe_intermediate_size": 0,
        }
    )
    config.tasks = ConfigDict(
        {
            "families": (
                "follow_hints",
                "count_matches",
                "move_files",
                "edit_config",
                "repair_permissions",
                "extract_logs",
            ),
            "horizons": (2, 3, 4, 5, 6),
            "held_out": ("merge_records",),
            "focus": 1.0,
            "floor": 0.35,
        }
    )
    config.environment = ConfigDict({"max_chunks": 10, "max_observation_chars": 200, "command_seconds": 5.0})
    config.demonstrations = ConfigDict({"count": 4000, "flawed_fraction": 0.35, "workers": 8})
    config.copying = ConfigDict({"context": (4, 20), "segment": (2, 6)})
    config.cpt = _supervised(steps=40, rows=32, row_length=64)
    config.sft = _supervised(steps=1500, rows=12, row_length=192)
    config.ipa = ConfigDict(
        {
            "return_level": "chunk",
            "ratio_level": "chunk",
            "mask_level": "chunk",
            "ratio_on": "negatives",
            "ratio_reference": "proximal",
            "gamma": 0.95,
            "mismatch_upper": 5.0,
            "mismatch_lower": None,
            "normalizer": "tokens",
            "failure_reward": 0.0,
            "baseline": "none",
            "imitation": "off",
            "lambda_il": 1.0,
            "lambda_rl": 1.0,
        }
    )
    config.rl = ConfigDict(
        {
            "steps": 120,
            "groups": 24,
            "group_size": 4,
            "row_length": 256,
            "max_chunks": 32,
            "micro_rows": 8,
            "updates_per_batch": 1,
            "skip_inert": True,
            "lora": {"rank": 0, "alpha": 16.0, "targets": ("wq", "wk", "wv", "wo")},
            "save_every": 25,
            "optimizer": _optimizer("adamw", 1.5e-3, None, "cosine", 5),
        }
    )
    config.resampling = ConfigDict(
        {
            "fraction": 0.0,
            "source": "demonstration",
            "start": "rollback",
            "threshold": 0.5,
            "anchors": 4,
            "fork_level": 0.05,
        }
    )
    config.engine = ConfigDict(
        {
            "slots": 64,
            "cohorts": 2,
            "max_length": 256,
            "extend_buckets": (16, 32, 64),
            "prompt_rows": 4,
            "max_chunk_tokens": 32,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "precision": "model",
            "page_size": 0,
            "pages": 0,
        }
    )
    config.rollout = ConfigDict(
        {
            "async_ratio": 0.0,
            "allow_unmasked": False,
            "env_threads": 16,
            "max_retries": 3,
            "redundancy": 0,
            "filter_groups": 0,
            "hosts": 0,
            "host_cpus": 1.0,
            "host_boot_seconds": 300.0,
            "host_silent_seconds": 120.0,
            "agent": "loop",
            "native": {
                "program": "",
                "command": "python3 {program}",
                "seconds": 120.0,
                "request_seconds": 60.0,
                "workers": 8,
            },
        }
    )
    config.evaluation = ConfigDict({"tasks": 120, "samples": 3, "every": 0, "tasks_during": 30, "temperature": 1.0})
    one = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    config.reward = ConfigDict(
        {
            "verifier": 1.0,
            "token_cost": 0.0,
            "chunk_error": 0.0,
            "judge": {
                "weight": 0.0,
                "url": "",
                "model": "",
                "api_key_variable": "",
                "rubric": "",
                "seconds": 30.0,
                "attempts": 3,
                "max_chars": 20_000,
            },
        }
    )
    config.mesh = ConfigDict({"train": one, "rollout": dict(one), "multiplex": False})
    config.checkpoint = ConfigDict({"supervised_every": 100, "every": 10, "keep": 2})
    return config


def _supervised(steps: int, rows: int, row_length: int) -> ConfigDict:
    return ConfigDict(
        {
            "steps": steps,
            "rows": rows,
            "row_length": row_length,
            "log_every": 10,
            "optimizer": _optimizer("muon", 2e-2, 1e-2, "cosine", 20),
        }
    )


def _optimizer(
    name: str, learning_rate: float, adam_learning_rate: float | None, schedule: str, warmup_steps: int
) -> ConfigDict:
    return ConfigDict(
        {
            "name": name,
            "learning_rate": learning_rate,
            "adam_learning_rate": adam_learning_rate,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "rounding": "nearest",
            "memory": "device",
        }
    )
