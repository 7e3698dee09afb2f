"""mrlm: train language models by reinforcement learning from one YAML recipe."""

__version__ = "0.1.0"
