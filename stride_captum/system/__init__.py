"""The machine: devices, memory, processes, atomic files, and the state of the caller that is put back."""
