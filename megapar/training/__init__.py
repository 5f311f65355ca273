"""Pretraining: config, loop, checkpoints, metrics, and the proof that parallel equals alone."""
