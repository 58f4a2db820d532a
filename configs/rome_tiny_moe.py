"""The twin of `rome_tiny` with a mixture of experts: 8 experts of which a token takes 2, the same active size."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("rome_tiny.py")))["get_config"]()
    config.name = "rome_tiny_moe"
    config.model.num_experts = 8
    config.model.num_experts_per_token = 2
    config.model.moe_intermediate_size = 192
    config.model.moe_dispatch = "auto"
    config.model.router_aux_loss_coef = 0.0
    config.model.router_z_loss_coef = 0.0
    config.engine.record_experts = False
    config.rl.router_replay = False
    return config
