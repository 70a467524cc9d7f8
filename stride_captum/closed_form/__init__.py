"""The default operators: first-order response of the losses of equations (1) and (2), in closed form."""
