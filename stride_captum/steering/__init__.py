"""Stage 1 of the paper (Algorithm 1, lines 4 to 8): steering operators trained on subsets."""
