"""Arguments of `STRIDE` from options that tests list flat, whichever object they belong to."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from stride_captum import ClosedForm, Features, Lasso, LeftRegular, Partition, RandomSubsets, Ridge, Trained

SUBSETS = {kind.name: kind for kind in (RandomSubsets, Partition, LeftRegular)}


def arguments(operators: str = "closed-form", **options: Any) -> dict[str, Any]:
    """Keyword arguments of `STRIDE`.

    >>> arguments("trained", rank=4, n_subsets=12, alpha=0.1)["operators"].recovery
    Lasso(alpha=0.1, center=True)
    """
    found: dict[str, Any] = {"operators": _trained(options) if operators == "trained" else _closed(options)}
    features = {field.name: options.pop(field.name) for field in fields(Features) if field.name in options}
    if features:
        found["features"] = Features(**features)
    return found | options


def _closed(options: dict[str, Any]) -> ClosedForm:
    return ClosedForm(**{f.name: options.pop(f.name) for f in fields(ClosedForm) if f.name in options})


def _trained(options: dict[str, Any]) -> Trained:
    subsets = SUBSETS[options.pop("subsets", "random")]
    sizes = {
        new: options.pop(old)
        for old, new in (("n_subsets", "n_subsets"), ("subset_size", "size"))
        if old in options
    }
    if subsets is Partition and options.pop("coverage", None) != "paper":
        sizes.pop("size", None)
    recovery = {"lasso": Lasso, "ridge": Ridge}[options.pop("recovery", "lasso")]
    penalty = {name: options.pop(name) for name in ("alpha", "center") if name in options}
    own = {f.name: options.pop(f.name) for f in fields(Trained) if f.name in options}
    return Trained(**own, subsets=subsets(**sizes), recovery=recovery(**penalty))
