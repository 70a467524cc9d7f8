"""What the runs of all measures share: the question, methods, models, cached answers, the gallery."""
