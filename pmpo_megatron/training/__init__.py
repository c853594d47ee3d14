"""Training: the run as a pipeline, what it is assembled of, its checks, guards, metrics and held-out evaluation."""
