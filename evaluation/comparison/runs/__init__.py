"""The runs behind each measure: one file a measure, and the plan of removals."""
