"""Features h(x) of the network (section 3): which layers are read, and how their outputs become rows."""
