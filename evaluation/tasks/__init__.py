"""Tasks: a network, its data and its training (Tables 2 and 3), the user's own data, the paper's tables."""
