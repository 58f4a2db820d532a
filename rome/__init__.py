"""ROME: training agentic language models in JAX. See the README for the map of the house."""

__version__ = "0.1.0"
