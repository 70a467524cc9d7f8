"""Arguments of `compare`, checked before anything is trained, as a `Question`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import bad_choice, bad_type, bad_value, whole_number
from ...system.devices import existing_device
from ..retraining.engines import ENGINES
from ..retraining.task_parts import HALVES, Split
from ..tasks.checks import check_task
from ..tasks.new_network import built
from ..tasks.task import Task
from ..tasks.task_loss import loss_of_methods
from .method_choice import left_out, specs_of
from .runs.counterfactual import Counterfactual
from .runs.lds import READINGS
from .runs.leakage import Leakage
from .runs.mislabel import Mislabel
from .runs.retrainings import Retrainings
from .shared.grids import grids, plain_numbers
from .shared.measure import Measure
from .shared.methods import METHODS, OUT_OF_SAMPLE, MethodSpec
from .shared.question import Question, halves

#: Measures by name. `compare` also takes a measure of your own once you have added it here.
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
    n_models: int | None = None,
    n_test: int = 300,
    device: torch.device | str = "cpu",
    **how: Any,
) -> Question:
    """Resolve the names of methods and measures, and refuse what cannot work.

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
        n_models: See there.
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
    for name, given in wanted.items():
        if n_models is not None and "n_models" in MEASURES[name].defaults:
            given.setdefault("n_models", n_models)
    on_halves = any(MEASURES[name].on_halves for name in wanted)
    every = specs_of(methods)
    skipped = left_out(every, task) if methods is None else {}
    tried = grids(every, task, options or {}, on_halves)
    specs = [replace(c, grid=tried[c.name]) for c in every if c.name not in skipped]
    question = Question(
        task=task,
        specs=specs,
        measures=wanted,
        halves=halves(task, store, n_subsets, n_seeds, n_test),
        on_halves=on_halves,
        store=Path(store),
        n_models=3 if n_models is None else n_models,
        device=device,
        options=plain_numbers(options or {}),
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
    note = _chosen_on_reported(question)
    if note:
        warnings.warn(note, stacklevel=2)
    on_models = list({spec.name: spec for m in chosen for spec in m.on_models(question)}.values())
    return replace(question, cross_fitted=cross_fitted, along=along, on_models=on_models, note=note)


def _chosen_on_reported(question: Question) -> str:
    """A warning if options that were given were chosen on test points that are reported here; else ""."""
    reported = [question.reported.start] if question.on_halves else []
    if Counterfactual.name in question.measures:
        points = MEASURES[Counterfactual.name].settings(question)["test_points"]
        reported.append(min(points, default=question.reported.start))
    if min(reported, default=question.chosen_on) >= question.chosen_on:
        return ""
    return (
        f"The options that were given were chosen on the first {question.chosen_on} test points, and test "
        f"points from {min(reported)} on are reported here: the figures are too good. Take at least "
        f"{2 * question.chosen_on} test points (--test-points, in Python n_test=)."
    )


def _with_budgets(
    measures: Any,
    retrainings: Sequence[float] | None,
    parts: int,
    methods: Sequence[str | MethodSpec] | None,
) -> Any:
    """The measures, and "retrainings" with its budgets and parts, for the methods that are named."""
    if isinstance(measures, str):
        return measures
    given = dict(measures) if isinstance(measures, Mapping) else {name: {} for name in measures}
    named, default = given.get(Retrainings.name, {}), Retrainings.defaults["parts"]
    if retrainings is None and Retrainings.name not in given:
        if parts != default:
            remedy = "Name budgets, with --retrainings (in Python: retrainings=)."
            raise bad_value("parts", "be given with `retrainings`", f"{parts} alone", remedy)
        return measures
    for argument, option, value in (
        ("retrainings", "budgets", None if retrainings is None else list(retrainings)),
        ("parts", "parts", None if parts == default else parts),
    ):
        if option in named and value not in (None, named[option]):
            came = f"{value}, and measures['retrainings'] with {option!r} = {named[option]}"
            raise bad_value(argument, "be given once", came)
    own: dict[str, Any] = {"parts": parts}
    if retrainings is not None:
        own["budgets"] = list(retrainings)
    if retrainings is not None and methods is not None:
        alone = [
            spec.name.removesuffix(OUT_OF_SAMPLE) if METHODS.get(spec.name) == spec else spec.name
            for spec in specs_of(methods)
            if spec.uses_model_alone
        ]
        own["methods"] = list(dict.fromkeys(alone))
    return {**given, Retrainings.name: {**own, **given.get(Retrainings.name, {})}}


def wanted_measures(
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The options of each measure, as Python's own numbers and sequences.

    Args:
        measures: As for `compare`.

    Raises:
        ValueError: A measure, or an option of one, that does not exist.
        TypeError: A single name instead of a sequence.
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
            for name, value in plain_numbers(options).items()
        }
    return wanted


def _check(question: Question) -> None:
    """Refuse counts, measures and methods that cannot work."""
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
    """Build a method with each of its option sets, on an untrained network."""
    task, extra = question.task, {}
    if spec.n_checkpoints != 1:
        if task.training.epochs < spec.fewest_epochs:
            must = f"be at least {spec.fewest_epochs} for {spec.name!r}"
            raise bad_value("epochs", must, task.training.epochs, "Its checkpoints are of different epochs.")
        extra = {"checkpoints": [network.state_dict()] * spec.fewest_epochs}
    if spec.partitions:
        models = [network.state_dict()] * (HALVES.parts * spec.partitions)
        extra = {"checkpoints": [*extra.get("checkpoints", ()), *models]}
    for point in spec.grid:
        try:
            loss = {} if task.has_classes else {"loss": loss_of_methods(task.loss)}
            spec(network, task.train, {**point, **extra, **loss}).check_loss(task.loss)
        except (TypeError, KeyError) as error:
            raise bad_value(
                "options",
                f"be such that {spec.name!r} can be built",
                f"{dict(point)} ({type(error).__name__}: {error})",
                "Where nothing chooses, a MethodSpec with a grid takes its `default`.",
            ) from error
