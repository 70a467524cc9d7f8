"""Training and test data: batches as users have them, passes over a data set, digests of examples."""
