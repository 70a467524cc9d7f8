"""What gradient methods share: per-example gradients, checks of the model, working copies."""
