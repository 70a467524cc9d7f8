"""LDS against the retraining budget: every method with the same checkpoints and the same models of parts.

A budget of 0 is the attributed model alone, and the checkpoints along its training. A budget of B is spent on
models of the parts of random partitions (cross-fitting): together they see as many examples times epochs as B
trainings on the whole training set. With a budget of 0, these models are also averaged with the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ....errors import bad_choice, bad_value, whole_number
from ...measures.linear_datamodeling import difference
from ...retraining.estimate import RetrainingEstimate
from ...retraining.task_parts import Split
from ...tasks.new_network import built
from ...tasks.task_loss import loss_of_methods
from ..shared.measure import Measure
from ..shared.methods import METHODS, MethodSpec
from ..shared.question import Question
from ..shared.shared import Shared
from .budget_row import BudgetRow
from .contenders import contender, grid_for
from .ladder import Ladder, repeats_for
from .lds import halves_estimate

#: Compared unless methods are named.
DEFAULT = ("STRIDE", "EKFAC", "TRAK", "DiagonalEKFAC", "TracIn")


class Retrainings(Measure):
    """LDS at each retraining budget, with the same models for all methods.

    Its options are `budgets` in trainings on the whole training set, `parts` of each partition, `epochs` of
    a training on a part (None for those of the task), `methods` by name, `up_to` (by method, the highest
    budget at which it is measured; `Comparison.skipped` names the rest) and `refined` (methods whose scores
    are also corrected by `refine`).
    """

    name = "retrainings"
    defaults: Mapping[str, Any] = {
        "budgets": (0, 1, 2, 5, 10),
        "parts": 2,
        "epochs": None,
        "methods": DEFAULT,
        "up_to": {"EKFAC": 5},
        "refined": ("STRIDE",),
    }
    on_halves = True
    fewest_subsets = 3

    def check(self, question: Question) -> None:
        """Refuse budgets that are no whole number of partitions, and methods that cannot be built."""
        settings, epochs = self.settings(question), question.task.training.epochs
        at = f"measures[{self.name!r}]"
        whole_number(f"{at}['parts']", settings["parts"], 2)
        if settings["parts"] > question.task.n_train:
            must = f"be at most n_train = {question.task.n_train}"
            raise bad_value(f"{at}['parts']", must, settings["parts"])
        if settings["epochs"] is not None:
            whole_number(f"{at}['epochs']", settings["epochs"], 1)
        budgets = settings["budgets"]
        if not isinstance(budgets, Sequence) or not budgets:
            raise bad_value(f"{at}['budgets']", "be a sequence of numbers", repr(budgets))
        each = _split(settings, epochs).trainings(1, epochs)
        for budget in budgets:
            if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget < math.inf:
                raise bad_value(f"{at}['budgets']", "hold numbers of at least 0", repr(budget))
            if not _is_whole(budget / each):
                must = f"be multiples of {each:g}, the cost of one partition"
                raise bad_value(f"{at}['budgets']", must, budget)
        if not settings["methods"]:
            raise bad_value(f"{at}['methods']", "name at least one method", "none")
        for name in (*settings["methods"], *settings["refined"], *settings["up_to"]):
            own = question.methods.get(name)
            if name not in METHODS and (own is None or not own.uses_model_alone):
                raise bad_choice(f"{at}['methods']", name, list(METHODS))
        if "methods" in question.measures[self.name]:
            for name in settings["methods"]:
                error = _refusal(contender(name, question), question, settings)
                if isinstance(error, TypeError):
                    must = "hold methods whose `build` takes the option `checkpoints`"
                    raise bad_value(f"{at}['methods']", must, f"{name!r} ({error})") from error
                if error is not None:
                    raise error

    def partitions(self, question: Question) -> dict[Split, int]:
        """The partitions of the highest budget that a method reaches."""
        settings, epochs = self.settings(question), question.task.training.epochs
        split = _split(settings, epochs)
        reached = [
            budget
            for name in settings["methods"]
            if contender(name, question).available
            for budget in _budgets(name, settings)
        ]
        return {split: repeats_for(max(reached, default=0), split, epochs)}

    def wants_checkpoints(self, question: Question) -> bool:
        """Yes, for a budget of 0."""
        return 0 in self.settings(question)["budgets"]

    def trainings(self, shared: Shared) -> list[RetrainingEstimate]:
        """The halves, the attributed models and their checkpoints, and the models of parts."""
        return [shared.once(halves_estimate), *shared.model_estimates]

    def run(self, shared: Shared) -> list[BudgetRow]:
        """A row for each method and budget."""
        question, settings = shared.question, self.settings(shared.question)
        rows: list[BudgetRow] = []
        for name in settings["methods"]:
            spec = contender(name, question)
            error = _refusal(spec, question, settings) if spec.available else None
            if error is not None or not spec.available:
                shared.skipped[name] = (
                    f"needs {spec.needs}" if error is None else f"does not take this task: {error}"
                )
                continue
            budgets = _budgets(name, settings)
            for budget in sorted(set(settings["budgets"]) - set(budgets)):
                why = f"is beyond its highest budget, {settings['up_to'][name]:g} (`up_to`)"
                shared.skipped[f"{spec.name} at {budget:g}"] = why
            split = _split(settings, question.task.training.epochs)
            ladder = Ladder(spec, shared, split, budgets, name in settings["refined"])
            first = {(row.source, row.trainings): row for row in rows if row.name == rows[0].name}
            last: BudgetRow | None = None
            for row in ladder.rows():
                other = first.get((row.source, row.trainings))
                row = replace(
                    row,
                    against_first=None if other is None else difference(other.lds, row.lds),
                    over_last=None if last is None else difference(row.lds, last.lds),
                )
                last = last or (row if row.source == "last checkpoint" else None)
                rows.append(row)
        return rows


def _budgets(name: str, settings: Mapping[str, Any]) -> list[float]:
    """The budgets at which a method is measured, from the lowest to the highest."""
    most = settings["up_to"].get(name, math.inf)
    return sorted({budget for budget in settings["budgets"] if budget <= most})


def _refusal(spec: MethodSpec, question: Question, settings: Mapping[str, Any]) -> Exception | None:
    """Why a method cannot be built with a point of its grids; None if it can be, or needs an extra."""
    if not spec.available:
        return None
    task, network = question.task, built(question.task).eval()
    given = {} if task.has_classes else {"loss": loss_of_methods(task.loss)}
    kept = {"checkpoints": [network.state_dict()] * 2}
    budgets = settings["budgets"]
    averages = [{**point, **kept} for point in grid_for(spec, question, averages=True)]
    alone = grid_for(spec, question, averages=False) if 0 in budgets else []
    for options in (*alone, *averages):
        try:
            spec(network, task.train, {**options, **given}).check_loss(task.loss)
        except (TypeError, KeyError, ValueError) as error:
            return error
    return None


def _split(settings: Mapping[str, Any], epochs: int) -> Split:
    return Split(settings["parts"], None if settings["epochs"] == epochs else settings["epochs"])


def _is_whole(n: float) -> bool:
    return abs(n - round(n)) < 1e-6
