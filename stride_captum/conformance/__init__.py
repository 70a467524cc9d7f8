"""The conformance suite: any attribution method against every law, by its author or in CI.

    from stride_captum.conformance import check
    report = check(MyMethod, exceptions={"self_influence_is_not_negative": "scores are random"})
    print(report)

`build` is the class, or a factory `build(model, train_dataset, **options)` that sets what the class needs.
It runs on planted data, without downloads and without pytest. `python -m stride_captum.conformance` prints
the matrix of the methods that ship.
"""

from .registry import CHECKS, Check, laws_of
from .runner import ConformanceReport, Subject, check, matrix, run_check
from .shipped import main, missing_extra, shipped, shipped_at_positions, shipped_for

__all__ = [
    "CHECKS",
    "ConformanceReport",
    "Check",
    "Subject",
    "check",
    "laws_of",
    "run_check",
    "main",
    "matrix",
    "missing_extra",
    "shipped",
    "shipped_at_positions",
    "shipped_for",
]
