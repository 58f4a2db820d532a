"""Floor 4: train state, jitted steps, the stages of a run (CPT → SFT → IPA), checkpoints, metrics and reports.

Read `run.py` for a run from top to bottom, `policy.py` for one reinforcement-learning update.
"""
