"""What a comparison is asked for: settled, and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import bad_choice, bad_type, bad_value, whole_number
from ...losses.summed_positions import SummedPositions
from ...system.devices import existing_device
from ..retraining.plan_files import ENGINES
from ..retraining.task_parts import Split
from ..tasks.checks import check_task
from ..tasks.new_network import built
from ..tasks.task import Task
from ..tasks.task_loss import loss_of_methods
from .runs.counterfactual import Counterfactual
from .runs.ladder import OUT_OF_SAMPLE
from .runs.lds import READINGS
from .runs.leakage import Leakage
from .runs.mislabel import Mislabel
from .runs.retrainings import Retrainings
from .shared.measure import Measure
from .shared.methods import DEFAULT_METHODS, METHODS, MethodSpec, find_method
from .shared.question import Question, halves

#: What can be measured, by name; one of your own is known to `compare` once it is here.
MEASURES: dict[str, Measure] = {
    measure.name: measure for measure in (*READINGS, Retrainings(), Counterfactual(), Mislabel(), Leakage())
}


def settle(
    methods: Sequence[str | MethodSpec] | None,
    task: Task,
    *,
    store: str | Path,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("lds",),
    retrainings: Sequence[float] | None = None,
    parts: int = 2,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_subsets: int = 100,
    n_seeds: int = 2,
    n_test: int = 300,
    device: torch.device | str = "cpu",
    **how: Any,
) -> Question:
    """Methods and measures by name become what is run; what cannot work is refused.

    Args:
        methods: As for `compare`, as are all others.
        task: See there.
        store: See there.
        measures: See there.
        retrainings: See there.
        parts: See there.
        options: See there; NumPy's numbers become Python's, in `measures` too.
        n_subsets: See there.
        n_seeds: See there.
        n_test: See there.
        device: See there.
        **how: Fields of `Question`.

    Raises:
        ValueError: As for `compare`.
        TypeError: As for `compare`.
        ImportError: As for `compare`.
    """
    device = existing_device(device)
    wanted = wanted_measures(_with_budgets(measures, retrainings, parts, methods))
    on_halves = any(MEASURES[name].on_halves for name in wanted)
    every = specs_of(methods)
    skipped = _not_possible(every, task, on_halves) if methods is None else {}
    grids = _grids(every, options or {}, on_halves)
    if not loss_of_methods(task.loss).tempered:
        grids = {name: _without_temperature(grid) for name, grid in grids.items()}
    if isinstance(task.loss, SummedPositions):
        grids = {name: _without_exact(grid) for name, grid in grids.items()}
    specs = [replace(c, grid=grids[c.name]) for c in every if c.name not in skipped]
    elsewhere = ", ".join(name for name in wanted if not MEASURES[name].on_halves)
    if elsewhere:
        why = f"is not measured by {elsewhere}: those train models of their own"
        skipped |= {spec.name: why for spec in specs if not spec.uses_model_alone}
    question = Question(
        task=task,
        specs=specs,
        measures=wanted,
        halves=halves(task, store, n_subsets, n_seeds, n_test),
        on_halves=on_halves,
        store=Path(store),
        device=device,
        skipped=skipped,
        **how,
    )
    _check(question)
    chosen = [MEASURES[name] for name in wanted]
    cross_fitted: dict[Split, int] = {}
    for measure in chosen:
        for split, n in measure.partitions(question).items():
            cross_fitted[split] = max(n, cross_fitted.get(split, 0))
    along = any(measure.wants_checkpoints(question) for measure in chosen)
    return replace(question, cross_fitted=cross_fitted, along=along)


def _with_budgets(
    measures: Any,
    retrainings: Sequence[float] | None,
    parts: int,
    methods: Sequence[str | MethodSpec] | None,
) -> Any:
    """The measures, with that of retraining budgets where they are given: of the methods that are named."""
    if retrainings is None or isinstance(measures, str):
        return measures
    given = dict(measures) if isinstance(measures, Mapping) else {name: {} for name in measures}
    own: dict[str, Any] = {"budgets": list(retrainings), "parts": parts}
    if methods is not None:
        alone = [spec.name for spec in specs_of(methods) if spec.uses_model_alone]
        own["methods"] = list(dict.fromkeys(name.removesuffix(OUT_OF_SAMPLE) for name in alone))
    return {**given, Retrainings.name: {**own, **given.get(Retrainings.name, {})}}


def wanted_measures(
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Options by measure.

    Raises:
        ValueError: A measure or an option of it that does not exist.
        TypeError: A single name.
    """
    if isinstance(measures, str):
        raise bad_type("measures", "be a sequence of names, or a mapping", measures, f"Write [{measures!r}].")
    given = measures if isinstance(measures, Mapping) else {measure: {} for measure in measures}
    wanted = {}
    for measure, options in given.items():
        if measure not in MEASURES:
            raise bad_choice("measures", measure, list(MEASURES))
        defaults = MEASURES[measure].defaults
        for name in options:
            if name not in defaults:
                raise (
                    bad_choice(f"measures[{measure!r}]", name, sorted(defaults))
                    if defaults
                    else bad_value(f"measures[{measure!r}]", "have no options", repr(name))
                )
        wanted[measure] = {
            name: (value,) if isinstance(value, str) and not isinstance(defaults[name], str) else value
            for name, value in _numbers(options).items()
        }
    return wanted


def specs_of(methods: Sequence[str | MethodSpec] | None) -> list[MethodSpec]:
    """Contenders by name, each once.

    Raises:
        ValueError: No such name, one that is there twice, or none.
        TypeError: A single name.
    """
    if isinstance(methods, str | MethodSpec):
        raise bad_type("methods", "be a sequence of names and Contenders", methods, "Write [method].")
    every = [find_method(m) for m in (DEFAULT_METHODS if methods is None else methods)]
    if not every:
        raise bad_value("methods", "name at least one method", "none")
    names = [c.name for c in every]
    for name in names:
        if names.count(name) > 1:
            raise bad_value("methods", "have names of their own", f"{name!r} twice", "Give each a `name`.")
    return every


def _not_possible(every: Sequence[MethodSpec], task: Task, on_halves: bool) -> dict[str, str]:
    """The methods that cannot be run, and why."""
    skipped = {}
    network = built(task).eval()
    for spec in every:
        if not task.has_classes:
            why = _refusal(spec, task, network)
            if why is not None:
                skipped[spec.name] = why
                continue
        if not spec.available:
            skipped[spec.name] = f"needs {spec.needs}"
        elif on_halves and task.training.epochs < spec.fewest_epochs:
            skipped[spec.name] = f"needs at least {spec.fewest_epochs} epochs"
    return skipped


def _refusal(spec: MethodSpec, task: Task, network: nn.Module) -> str | None:
    """Why a method does not take the loss of a task; None where it does."""
    try:
        options = {**spec.grid[0], "loss": loss_of_methods(task.loss)}
        spec(network, task.train, options).check_loss(task.loss)
    except ValueError as error:
        return f"does not take this task: {error}"
    return None


def _grids(
    every: Sequence[MethodSpec], options: Mapping[str, Mapping[str, Any]], on_halves: bool
) -> dict[str, list[Any]]:
    """The points that are chosen from, by method: one where options are given, or nothing chooses."""
    known = list(dict.fromkeys([*(c.name for c in every), *METHODS]))
    for name in options:
        if name not in known:
            raise bad_choice("options", name, known)
    found = {}
    for spec in every:
        grid: Sequence[Mapping[str, Any]] = spec.grid
        if spec.name in options:
            grid = [options[spec.name]]
        elif not on_halves and len(grid) > 1:
            grid = [spec.default]
        found[spec.name] = [_numbers(point) for point in grid]
    return found


def _without_temperature(grid: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of a grid for a loss that has no temperature, each once."""
    found: list[dict[str, Any]] = []
    for point in grid:
        kept = {name: value for name, value in point.items() if name != "temperature"}
        if kept.get("residuals") != "temperature" and kept not in found:
            found.append(kept)
    return found


def _without_exact(grid: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The empirical Fisher instead of the exact one, which takes a pass for each output of a position."""
    return [
        {**point, **({"fisher": "empirical"} if point.get("fisher") == "exact" else {})} for point in grid
    ]


def _check(question: Question) -> None:
    """Refuse what cannot work."""
    measures = [MEASURES[name] for name in question.measures]
    plan, fewest = question.halves, max((measure.fewest_subsets for measure in measures), default=1)
    for name, value, least in (
        ("n_subsets", plan.membership.shape[0], fewest),
        ("n_models", question.n_models, 1),
        ("n_spiked", question.n_spiked, 0),
        ("n_resamples", question.n_resamples, 0),
    ):
        whole_number(name, value, least)
    if question.engine not in ENGINES:
        raise bad_choice("engine", question.engine, ENGINES)
    check_task(question.task)
    for measure in measures:
        for count in ("n_models", "n_seeds", "n_points", "n_held_out"):
            if count in question.measures[measure.name]:
                given = question.measures[measure.name][count]
                whole_number(f"measures[{measure.name!r}][{count!r}]", given, 1)
        if not measure.takes(question.task):
            must = "be read off retrained halves, or leakage, for a task without classes"
            raise bad_value("measures", must, repr(measure.name))
        measure.check(question)
    network = built(question.task).eval()
    for spec in question.specs:
        _check_builds(spec, question, network)


def _check_builds(spec: MethodSpec, question: Question, network: nn.Module) -> None:
    """Whether a method can be built with all of its options, on an untrained network."""
    task, extra = question.task, {}
    if spec.n_checkpoints != 1:
        if question.on_halves and task.training.epochs < spec.fewest_epochs:
            must = f"be at least {spec.fewest_epochs} for {spec.name!r}"
            raise bad_value("epochs", must, task.training.epochs, "Its checkpoints are of different epochs.")
        extra = {"checkpoints": [network.state_dict()] * spec.fewest_epochs}
    if spec.partitions:
        extra = {"checkpoints": [network.state_dict()] * 2}
    for point in spec.grid:
        try:
            loss = {} if task.has_classes else {"loss": loss_of_methods(task.loss)}
            spec(network, task.train, {**point, **extra, **loss})
        except (TypeError, KeyError) as error:
            raise bad_value(
                "options",
                f"be such that {spec.name!r} can be built",
                f"{dict(point)} ({type(error).__name__}: {error})",
                "Where nothing chooses, a MethodSpec with a grid takes its `default`.",
            ) from error


def _numbers(value: Any) -> Any:
    """NumPy's numbers as Python's, also inside of mappings and sequences."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _numbers(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_numbers(part) for part in value)
    return value
