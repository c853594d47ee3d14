"""PMPO (arXiv 2601.22521) as a Megatron-Core trainer for reasoning models with long trajectories."""

__version__ = "0.1.0"
