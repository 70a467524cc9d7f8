"""Digests of code and values, the environment, and text files."""
