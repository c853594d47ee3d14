"""Rollout engines: vLLM in a process of its own, running servers, or recorded rollouts."""
