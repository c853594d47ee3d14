"""Prompts, their order, and the packing of trajectories into micro-batches."""
