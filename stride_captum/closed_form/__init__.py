"""Closed-form operators, the default: first-order solution of equations (1) and (2)."""
