"""What a comparison is asked for: settled, and checked before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from ... import adapters
from ...errors import bad_choice, bad_type, bad_value, whole_number
from ..measures.counterfactual_drop import resolve_counts
from ..measures.mislabel_precision import flip_labels
from ..retraining.plan import ENGINES
from ..tasks.checks import check_task
from ..tasks.new_network import built
from ..tasks.tasks import Task
from .counterfactual_runs import measure_counterfactual
from .leakage_runs import check_planting, measure_leakage
from .methods import DEFAULT_METHODS, METHODS, MethodSpec, find_method
from .mislabel_runs import measure_mislabel

#: What can be measured.
MEASURES = ("lds", "calibration", "linearized", "counterfactual", "mislabel", "leakage")
#: Those that are read off retrained halves, and come with the choice of options.
OF_HALVES = frozenset({"lds", "calibration", "linearized"})
#: Detectors of label noise that need no influence.
DETECTORS = {
    "loss": adapters.LossDetector,
    "ridge leave-one-out": adapters.RidgeLeaveOneOut,
    "confident learning": adapters.ConfidentLearning,
}
#: Which scores the counterfactual removes.
ARMS = ("proponents", "opponents")
#: What `compare` gives the measures itself.
_GIVEN = frozenset({"store", "options", "n_resamples", "show_progress", "opponents", "detectors", "device"})
_RUNS: dict[str, tuple[Callable[..., Any] | None, frozenset[str]]] = {
    "lds": (None, frozenset()),
    "calibration": (None, frozenset()),
    "linearized": (None, frozenset()),
    "counterfactual": (measure_counterfactual, frozenset({"methods", "arms", "n_points"})),
    "mislabel": (measure_mislabel, frozenset({"detectors"})),
    "leakage": (measure_leakage, frozenset()),
}
#: Fewest subsets of a measure.
_FEWEST = {"lds": 3, "calibration": 3, "linearized": 6}


@dataclass(frozen=True)
class Asked:
    """What is compared, with all options settled.

    Attributes:
        specs: With the grids that the tuning half chooses from, and one point where nothing chooses.
        measures: Options of each measure.
        skipped: Methods that are left out, and why.
    """

    specs: list[MethodSpec]
    measures: dict[str, dict[str, Any]]
    skipped: dict[str, str]

    @property
    def on_halves(self) -> bool:
        """Whether halves are retrained."""
        return bool(OF_HALVES & self.measures.keys())

    @property
    def usable(self) -> dict[str, MethodSpec]:
        """Contenders by name that need nothing but a model: those of measures that train their own."""
        return {c.name: c for c in self.specs if c.n_checkpoints == 1}


def settle(
    methods: Sequence[str | MethodSpec] | None,
    task: Task,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Asked:
    """Methods and measures by name become what is run; NumPy's numbers become Python's.

    Args:
        methods: As for `compare`.
        task: The task.
        measures: As for `compare`.
        options: As for `compare`.

    Raises:
        ValueError: A name that does not exist, or is there twice.
        TypeError: A single name instead of a sequence of them.
    """
    wanted = wanted_measures(measures)
    on_halves = bool(OF_HALVES & wanted.keys())
    every = specs_of(methods)
    skipped = {}
    for spec in every if methods is None else ():
        if not spec.available:
            skipped[spec.name] = f"needs {spec.needs}"
        elif on_halves and task.training.epochs < spec.n_checkpoints:
            skipped[spec.name] = f"needs at least {spec.n_checkpoints} epochs"
    given = {name: _numbers(chosen) for name, chosen in (options or {}).items()}
    known = [*(c.name for c in every), *METHODS]
    for name in given:
        if name not in known:
            raise bad_choice("options", name, list(dict.fromkeys(known)))
    specs = []
    for spec in every:
        grid = [_numbers(point) for point in spec.grid]
        if spec.name in given:
            grid = [given[spec.name]]
        elif not on_halves:
            grid = [grid[0] if len(grid) == 1 else _numbers(spec.default)]
        if spec.name not in skipped:
            specs.append(replace(spec, grid=grid))
    elsewhere = [name for name in wanted if name not in OF_HALVES]
    for spec in specs:
        if spec.n_checkpoints > 1 and elsewhere:
            skipped[spec.name] = f"is not measured by {', '.join(elsewhere)}: those train models of their own"
    return Asked(specs, wanted, skipped)


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
            raise bad_choice("measures", measure, MEASURES)
        known = options_of(measure)
        for name in options:
            if name not in known:
                raise (
                    bad_choice(f"measures[{measure!r}]", name, known)
                    if known
                    else bad_value(f"measures[{measure!r}]", "have no options", repr(name))
                )
        wanted[measure] = _numbers(options)
        for name in ("arms", "methods", "detectors", "kinds"):
            if isinstance(wanted[measure].get(name), str):
                wanted[measure][name] = (wanted[measure][name],)
    return wanted


def options_of(measure: str) -> list[str]:
    """Names of the options that a measure takes in `compare`."""
    run, more = _RUNS[measure]
    if run is None:
        return []
    parameters = inspect.signature(run).parameters.values()
    return sorted({p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _GIVEN | more)


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


def check(asked: Asked, task: Task, *, n_test: int, half: int, **sizes: Any) -> None:
    """Refuse what cannot work.

    Args:
        asked: From `settle`.
        task: The task.
        n_test: Test points, both halves together.
        half: Of them that choose options.
        **sizes: `n_subsets`, `n_seeds`, `n_models`, `n_spiked`, `n_resamples` and `engine` of `compare`.

    Raises:
        ValueError: What, and what it must be.
        ImportError: A method that is named needs an extra.
    """
    fewest = max((_FEWEST.get(name, 1) for name in asked.measures), default=1)
    for name, least in (
        ("n_subsets", fewest),
        ("n_seeds", 1),
        ("n_models", 1),
        ("n_spiked", 0),
        ("n_resamples", 0),
    ):
        whole_number(name, sizes[name], least)
    if sizes["engine"] not in ENGINES:
        raise bad_choice("engine", sizes["engine"], ENGINES)
    check_task(task)
    checks = {"counterfactual": _check_counterfactual, "mislabel": _check_mislabel, "leakage": _check_leakage}
    for name, options in asked.measures.items():
        if name in checks:
            for count in ("n_models", "n_seeds", "n_points", "n_held_out"):
                if count in options:
                    whole_number(f"measures[{name!r}][{count!r}]", options[count], 1)
            checks[name](asked, task, options, n_test, half)
    _check_builds(asked, task)


def _check_counterfactual(asked: Asked, task: Task, options: dict[str, Any], n_test: int, half: int) -> None:
    resolve_counts(options.get("counts", (50, 100, 500)), task.n_train)
    for arm in options.get("arms", ARMS[:1]):
        if arm not in ARMS:
            raise bad_choice("measures['counterfactual']['arms']", arm, ARMS)
    known = list(dict.fromkeys([*asked.usable, *METHODS]))
    for name in options.get("methods") or ():
        if name not in known:
            raise bad_choice("measures['counterfactual']['methods']", name, known)
    kept = counterfactual_methods(asked)
    if options.get("methods") and not set(options["methods"]) & kept.keys():
        raise bad_choice("measures['counterfactual']['methods']", options["methods"][0], list(asked.usable))
    if "reference" in options and options["reference"] not in kept:
        raise bad_choice("measures['counterfactual']['reference']", options["reference"], list(kept))
    if options.get("engine", ENGINES[0]) not in ENGINES:
        raise bad_choice("measures['counterfactual']['engine']", options["engine"], ENGINES)
    points = options.get("test_points")
    if points is not None and "n_points" in options:
        raise bad_value("measures['counterfactual']", "have `test_points` or `n_points`", "both")
    if points is not None:
        first, places = (half if asked.on_halves else 0), list(points)
        if (
            not places
            or len(set(places)) < len(places)
            or not first <= min(places) <= max(places) < len(task.test)
        ):
            must = f"be distinct places in [{first}, {len(task.test)})"
            why = "Options are chosen on the test points before." if first else None
            raise bad_value("measures['counterfactual']['test_points']", must, places, why)
    elif options.get("n_points", 0) > n_test - half:
        must = f"be at most the {n_test - half} reported test points"
        raise bad_value("measures['counterfactual']['n_points']", must, options["n_points"])


def counterfactual_methods(asked: Asked) -> dict[str, MethodSpec]:
    """The specs whose examples are removed, with the controls."""
    chosen = asked.measures.get("counterfactual", {}).get("methods") or list(asked.usable)
    return {n: c for n, c in asked.usable.items() if n in {*chosen, "ClassRandom", "Similarity"}}


def _check_mislabel(asked: Asked, task: Task, options: dict[str, Any], n_test: int, half: int) -> None:
    for name in options.get("detectors", ()):
        if name not in DETECTORS:
            raise bad_choice("measures['mislabel']['detectors']", name, list(DETECTORS))
    for name in asked.usable.keys() & set(options.get("detectors", DETECTORS)):
        raise bad_value("methods", "have names that no detector has", repr(name))
    labels = task.train.tensors[1].numpy()
    flip_labels(labels, options.get("rate", 0.1), task.n_classes, kind=options.get("kind", "symmetric"))


def _check_leakage(asked: Asked, task: Task, options: dict[str, Any], n_test: int, half: int) -> None:
    check_planting(task, options.get("counts", (1, 10, 100)), options.get("kinds", ("exact",)))


def _check_builds(asked: Asked, task: Task) -> None:
    """Whether every method can be built with all of its options, on an untrained network."""
    network = built(task).eval()
    for spec in asked.specs:
        extra = {}
        if spec.n_checkpoints > 1:
            if asked.on_halves and task.training.epochs < spec.n_checkpoints:
                must = f"be at least {spec.n_checkpoints} for {spec.name!r}"
                raise bad_value(
                    "epochs", must, task.training.epochs, "Its checkpoints are of different epochs."
                )
            extra = {"checkpoints": [network.state_dict()] * spec.n_checkpoints}
        for point in spec.grid:
            try:
                spec(network, task.train, {**point, **extra})
            except (TypeError, KeyError) as error:
                raise bad_value(
                    "options",
                    f"be such that {spec.name!r} can be built",
                    f"{dict(point)} ({type(error).__name__}: {error})",
                    "Where nothing chooses, a MethodSpec with a grid takes its `default`.",
                ) from error


def usable_detectors(options: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Detectors that can be run, and what the others need."""
    chosen: Iterable[str] = options.get("detectors", DETECTORS)
    missing = {} if find_spec("cleanlab") else {"confident learning": "needs cleanlab"}
    return [n for n in chosen if n not in missing], {n: missing[n] for n in chosen if n in missing}


def _numbers(value: Any) -> Any:
    """NumPy's numbers as Python's, also inside of mappings and sequences."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _numbers(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_numbers(part) for part in value)
    return value
