"""Checkpoints that a method averages over: what a user may pass, and the weights that are read from it."""
