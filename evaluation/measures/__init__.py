"""Measures: arrays go in, results with intervals come out. No model and no data set is needed."""
