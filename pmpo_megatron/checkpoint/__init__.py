"""Checkpoints of a run: complete or absent, checked before they are used."""
