"""The trainer's weights into the rollout engine. Nothing is imported here: vLLM's workers import this package too."""
