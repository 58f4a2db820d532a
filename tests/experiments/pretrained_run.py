"""The tiny run as it starts from a published model: a config file for `experiments/ipa_train.py`."""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """`tiny_run.py` without a model or tokenizer of its own, and without the stage that a random policy needs."""
    config = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))["get_config"]()
    for name in ("model", "vocab_size", "digits_per_token"):
        del config[name]
    config.model = ConfigDict({"pretrained": ""})
    config.induction = False
    config.cpt.steps = 0
    config.sft.update(steps=12, row_length=384, log_every=1)
    config.rl.update(steps=2, row_length=384)
    config.engine.update(max_length=384, extend_buckets=(16, 192), max_chunk_tokens=24)
    config.checkpoint.update(every=1, keep=20)
    return config
