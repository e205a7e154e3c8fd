"""Runs: their folders, identity, checkpoints, and what is checked before the first image."""
