"""Measures: functions from arrays to results with intervals, without models or data sets."""
