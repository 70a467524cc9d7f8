"""Ground truth: models retrained on subsets, one by one or many at once, kept in a store that resumes."""
