"""Hugging Face checkpoints: shapes, names and streaming. One file per architecture, each mapping written once."""
