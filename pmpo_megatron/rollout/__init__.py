"""Rollout engines: vLLMs in processes of their own, or recorded rollouts."""
