"""Methods as the ladder measures them: with out-of-sample residuals, and a grid over their damping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...tasks.task_loss import loss_of_methods
from ..shared.grids import for_loss, plain_numbers
from ..shared.methods import METHODS, OUT_OF_SAMPLE, MethodSpec
from ..shared.question import Question


def contender(name: str, question: Question) -> MethodSpec:
    """The method that is measured for a name, with its grid for one model.

    A spec of your own is measured as it is. A known method has out-of-sample residuals if it can have them,
    and a grid over its damping alone. Options that were given, for the method that is measured or for
    `name`, are its only grid.
    """
    own = question.methods.get(name)
    if own is not None and own.uses_model_alone and _is_of_the_user(own, question):
        return own
    tuned = {"STRIDE": "STRIDE (tuned)"}.get(name, name + OUT_OF_SAMPLE)
    spec = METHODS.get(tuned, METHODS[name])
    given = question.options.get(tuned, question.options.get(name))
    dampings = list(dict.fromkeys(point["damping"] for point in spec.grid if "damping" in point))
    own_grid = [{}] if tuned in METHODS else spec.grid
    grid = [{"damping": d} for d in dampings] or own_grid if given is None else [given]
    return replace(
        spec,
        name=spec.name if spec.name.endswith(OUT_OF_SAMPLE) else name,
        grid=for_loss([dict(point) for point in grid], question.task.loss),
    )


def _is_of_the_user(spec: MethodSpec, question: Question) -> bool:
    """Whether a spec differs from the known one of its name, other than by options that were given."""
    known = METHODS.get(spec.name)
    if known is None or replace(spec, grid=()) != replace(known, grid=()):
        return True
    grid = for_loss([plain_numbers(point) for point in known.grid], question.task.loss)
    return spec.name not in question.options and list(spec.grid) != grid


def grid_for(spec: MethodSpec, question: Question, *, averages: bool) -> list[dict[str, Any]]:
    """The grid of a contender with the residuals of one model, or of averages over models.

    Args:
        spec: From `contender`.
        question: Residuals are those that the loss of its task has.
        averages: Whether the method is given checkpoints.
    """
    known = METHODS.get(spec.name)
    if known is None or known.build is not spec.build or not spec.name.endswith(OUT_OF_SAMPLE):
        return [dict(point) for point in spec.grid]
    tempered = loss_of_methods(question.task.loss).tempered
    residuals = "temperature" if averages and tempered else "both"
    return [{"residuals": residuals, **point} for point in spec.grid]
