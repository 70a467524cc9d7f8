"""The conformance suite: any attribution method against every law, by its author or in CI.

    from stride_captum.conformance import check
    report = check(MyMethod, exceptions={"self_influence_is_not_negative": "scores are random"})
    print(report)

`build` is the class, or a factory `build(model, train_dataset, **options)` that sets what the class needs.
It runs on planted data, without downloads and without pytest. `python -m stride_captum.conformance` prints
the matrix of the methods that ship.
"""

from .law import LAWS, Law
from .shipped import main, missing_extra, shipped
from .suite import ConformanceReport, Subject, check, judge, matrix

__all__ = [
    "LAWS",
    "ConformanceReport",
    "Law",
    "Subject",
    "check",
    "judge",
    "main",
    "matrix",
    "missing_extra",
    "shipped",
]
