"""Qwen3-MoE 30B-A3B at 32k tokens of context on 128 TPU v5p chips (4 × 4 × 8). Check it without a TPU:

    python experiments/compile_check.py --config=configs/rome_30b.py --topology=v5p:4x4x8

One row of 32k tokens a chip: parameters, gradients and optimizer are split over all chips (fsdp) and gathered layer by
layer. Longer contexts split rows over `mesh.train.context`. Rollouts split experts over groups of eight chips.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

CONTEXT = 32768
CHIPS = 128


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("rome_tiny.py")))["get_config"]()
    config.name = "rome_30b"
    config.vocab_size = 151936
    config.induction = False
    config.model = ConfigDict(
        {
            "hidden_size": 2048,
            "num_layers": 48,
            "num_heads": 32,
            "num_kv_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_token": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "rope_theta": 1e7,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": False,
            "qk_norm": True,
            "scan_layers": True,
            "remat": True,
            "head_chunk": 2048,
            "dtype": "bfloat16",
            "param_dtype": "float32",
        }
    )
    config.mesh = ConfigDict(
        {
            "train": {"data": 1, "fsdp": CHIPS, "expert": 1, "context": 1, "tensor": 1},
            "rollout": {"data": CHIPS // 8, "fsdp": 1, "expert": 8, "context": 1, "tensor": 1},
            "multiplex": False,
        }
    )
    config.rl.update(row_length=CONTEXT, micro_rows=CHIPS, max_chunks=256, groups=64, group_size=8)
    config.rl.optimizer.update(learning_rate=1e-6, weight_decay=0.01)
    config.engine.update(
        slots=4 * CHIPS,
        cohorts=2,
        prompt_rows=CHIPS,
        max_length=CONTEXT,
        extend_buckets=(64, 512),
        max_chunk_tokens=1024,
        top_k=20,
    )
    return config
