"""Comparison of methods on one task: the protocol, the runs behind each measure, and the score cache."""
