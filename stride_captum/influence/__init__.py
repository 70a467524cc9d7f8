"""What every attribution method inherits: Captum's contract, queries, checkpoints, streamed top-k and cost
estimates.
"""
