"""Benchmarks: where their problems come from, the records of their responses, and the statistics of their scores."""
