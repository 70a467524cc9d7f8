"""Features that are kept: the store on disk, and projections of wide layers."""
