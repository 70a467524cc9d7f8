"""Feature store on disk, precomputed features, and projections of wide layers."""
