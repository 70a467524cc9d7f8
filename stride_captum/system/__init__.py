"""Devices, memory, processes, atomic files, and preservation of the caller's state."""
