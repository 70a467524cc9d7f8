"""Comparison of methods on one task: the same models, subsets, test points and response for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...errors import bad_value, whole_number
from ...subsets import Membership, random_subsets
from ...system.devices import existing_device
from ...system.fingerprints import weights_fingerprint
from ..measures.calibration import calibration
from ..measures.cost import forward_seconds, median_cost
from ..measures.linear_datamodeling import difference, lds, margins
from ..measures.linearized_influence import linearized_influence_correlation
from ..retraining.attributed_models import train_attributed, train_checkpoints, train_spiked
from ..retraining.estimate import RetrainingEstimate
from ..retraining.plan import RetrainingPlan, without_diverged
from ..retraining.store import Fingerprints
from ..retraining.training import mean_residual
from ..system import environment
from ..tasks.tasks import Task
from .counterfactual_runs import CounterfactualRow, measure_counterfactual
from .counterfactual_runs import cost as counterfactual_cost
from .gallery import Gallery
from .leakage_runs import measure_leakage
from .methods import MethodSpec
from .mislabel_runs import measure_mislabel
from .plan import DETECTORS, Asked, check, counterfactual_methods, settle, usable_detectors
from .results import Comparison, Row
from .score_cache import Answer, CachedMethod


@dataclass(frozen=True)
class _Setting:
    """What all methods share."""

    task: Task
    models: Mapping[str, nn.Module]
    checkpoints: Mapping[str, list[Any]]
    test: tuple[Tensor, Tensor]
    half: int
    membership: Membership
    responses: NDArray[Any]
    n_resamples: int
    measures: frozenset[str]
    store: Path
    forward: float
    gallery: Gallery

    def build(self, spec: MethodSpec, options: Mapping[str, Any]) -> list[CachedMethod]:
        """The method on every attributed model."""
        found = []
        for name, model in self.models.items():
            extra: dict[str, Any] = {}
            if spec.n_checkpoints > 1:
                extra["checkpoints"] = [*self.checkpoints[name], model.state_dict()]
            given = {**options, **extra}
            found.append(CachedMethod(spec, model, self.task, given, self.store, self.forward))
        return found

    def answers(self, methods: Sequence[CachedMethod], rows: slice) -> list[Answer]:
        """`(n_test, n_train)` of each model for some test points."""
        x, y = (t[rows] for t in self.test)
        return [method.margins((x, y)) for method in methods]


def compare(
    methods: Sequence[str | MethodSpec] | None,
    task: Task,
    *,
    store: str | Path,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("lds", "calibration"),
    n_subsets: int = 100,
    n_seeds: int = 2,
    n_models: int = 3,
    n_spiked: int = 0,
    n_test: int = 300,
    n_jobs: int = -1,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_resamples: int = 1000,
    show_progress: bool = False,
) -> Comparison:
    """Compare methods on a task.

    The protocol: `n_subsets` random halves of the training set, `n_seeds` retrainings each from
    scratch; the response is the margin of the true class; every attributed model is scored alone. The
    first half of the test points chooses among the grid of a method by LDS, the second half is
    reported; the other measures take the options that were chosen. Where neither LDS nor what is read off
    the same halves is asked for, none are retrained, and a method with a grid takes its default options
    unless `options` has others. Halves of which a retraining diverges are left out and counted. What
    cannot work is refused before anything is trained.

    Args:
        methods: Names from `METHODS`, or specs of your own; None takes `DEFAULT_METHODS` as far
            as they can be run.
        task: The task.
        store: Folder of the retrainings, the trained models and the answers of methods: what is there is
            not done again.
        measures: From `MEASURES`; or a mapping to options of `measure_counterfactual`,
            `measure_mislabel` and `measure_leakage`; "counterfactual" also takes `methods` (names),
            `arms` ("proponents", "opponents") and `n_points` (10 of the reported test points); "mislabel"
            also takes `detectors` (names from `DETECTORS`, all of them).
        n_subsets: m.
        n_seeds: s; at least 2 give a ceiling.
        n_models: Attributed models, trained with seeds 0, 1, ...
        n_spiked: Further attributed models that were stopped on a spike of their training loss.
        n_test: Test points, both halves together.
        n_jobs: Processes for the retrainings.
        engine: How the halves are retrained, see `RetrainingPlan.execute`.
        device: Where every model is trained and every method is run.
        options: By name of a method, options that are taken as they are instead of being chosen; those
            that another comparison chose are in its `Row.options`.
        n_resamples: Of the bootstraps.
        show_progress: Whether to show bars.

    Raises:
        ValueError: A method, measure or option that does not exist, two methods of one name, sizes that
            the task does not have, inputs or labels that the network cannot read, or more than a tenth of
            the halves diverge.
        TypeError: One name instead of a sequence of names.
        ImportError: A method that is named needs an extra.

    >>> import tempfile
    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> sizes = {"n_subsets": 4, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1}
    >>> with tempfile.TemporaryDirectory() as store:
    ...     result = compare(["STRIDE", "Random"], task, store=store, measures=["lds"], **sizes)
    >>> [row.name for row in result.rows]
    ['STRIDE', 'Random']
    """
    device = existing_device(device)
    asked = settle(methods, task, measures, options)
    plan, store = halves(task, store, n_subsets, n_seeds, n_test), Path(store)
    half, n_test = plan.n_test // 2, plan.n_test
    sizes = {"n_subsets": n_subsets, "n_seeds": n_seeds, "n_models": n_models, "n_spiked": n_spiked}
    check(asked, task, n_test=n_test, half=half, n_resamples=n_resamples, engine=engine, **sizes)
    models: dict[str, nn.Module] = {}
    checkpoints: dict[str, list[Any]] = {}
    if asked.on_halves or "counterfactual" in asked.measures:
        models, checkpoints = _attributed(task, store, n_models, n_spiked, asked, device)
    shown = models if asked.on_halves else {}
    gallery = Gallery(task, shown, range(half, n_test), rank_suspects="mislabel" not in asked.measures)
    rows: list[Row] = []
    left_out: list[int] = []
    if asked.on_halves:
        x_test, y_test = (t[:n_test] for t in task.test.tensors)
        logits = plan.execute(n_jobs, show_progress, engine=engine, device=device)
        membership, logits, left_out = without_diverged(plan, logits)
        setting = _Setting(
            task=task,
            models=models,
            checkpoints=checkpoints,
            test=(x_test, y_test),
            half=half,
            membership=membership,
            responses=margins(logits, y_test.numpy()),
            n_resamples=n_resamples,
            measures=frozenset(asked.measures),
            store=store,
            forward=forward_seconds(next(iter(models.values())), task.train),
            gallery=gallery,
        )
        bar = tqdm(asked.specs, desc="methods", disable=not show_progress)
        for spec in bar:
            bar.set_postfix_str(spec.name)
            rows.append(_row(spec, setting, rows[0] if rows else None))
    common: dict[str, Any] = {
        "store": store,
        "options": {c.name: c.grid[0] for c in asked.specs} | {row.name: row.options for row in rows},
        "n_resamples": n_resamples,
        "device": device,
    }
    parts: dict[str, Any] = {}
    if "counterfactual" in asked.measures:
        points = range(half, n_test)  # none that options were chosen on
        parts["counterfactual"] = _counterfactual(
            asked, task, models, points, common, n_jobs=n_jobs, show_progress=show_progress
        )
    skipped = dict(asked.skipped)
    if "mislabel" in asked.measures:
        usable, missing = usable_detectors(asked.measures["mislabel"])
        skipped |= missing
        settings = {k: v for k, v in asked.measures["mislabel"].items() if k != "detectors"}
        detectors = {name: _detect(DETECTORS[name]) for name in usable}
        parts["mislabel"] = measure_mislabel(task, asked.usable, detectors=detectors, **common, **settings)
    if "leakage" in asked.measures:
        parts["leakage"] = measure_leakage(task, asked.usable, **common, **asked.measures["leakage"])
    on_halves = asked.on_halves
    protocol = {
        "n_train": task.n_train,
        "n_subsets": n_subsets - len(left_out) if on_halves else 0,
        "left_out": left_out,
        "subset_size": task.n_train // 2,
        "n_seeds": n_seeds if on_halves else 0,
        "n_test_tuning": half if on_halves else 0,
        "n_test_reported": n_test - half if on_halves else 0,
        "options": common["options"],
        "response": "margin of the true class",
        "models": {name: mean_residual(m, *task.train.tensors) for name, m in models.items()},
        "n_resamples": n_resamples,
        "measures": asked.measures,
        "training": asdict(task.training),
        "fingerprints": {
            "task": Fingerprints(task).of(0, None, ""),
            "models": {name: weights_fingerprint(m) for name, m in models.items()},
        },
    }
    return Comparison(
        task.name,
        task.note,
        rows,
        protocol,
        environment.describe(device),
        skipped=skipped,
        gallery=gallery.to_dict(parts.get("mislabel", ())),
        **parts,
    )


def comparison_sizes(preset: str) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Arguments of `compare` for a preset of the task: sizes, and options of the measures.

    "smoke" is there to see that everything runs, in minutes; its intervals are wide.
    """
    if preset != "smoke":
        return {"n_subsets": 100, "n_seeds": 2, "n_models": 3, "n_test": 300}, {}
    sizes = {"n_subsets": 50, "n_seeds": 2, "n_models": 2, "n_test": 120}
    few = ("STRIDE", "EKFAC", "TracIn", "Similarity", "ClassRandom")
    measures: dict[str, dict[str, Any]] = {
        "counterfactual": {
            "counts": (0.05, 0.2),
            "n_points": 6,
            "n_seeds": 2,
            "methods": few,
            "arms": ("proponents", "opponents"),
        },
        "mislabel": {"n_held_out": 100},
        "leakage": {"counts": (10,), "kinds": ("exact",)},
    }
    return sizes, measures


def halves(task: Task, store: str | Path, n_subsets: int, n_seeds: int, n_test: int) -> RetrainingPlan:
    """The retrainings that LDS is measured against.

    Args:
        task: The task.
        store: Folder of the retrainings.
        n_subsets: Random halves of the training set.
        n_seeds: Retrainings of each.
        n_test: Test points, as many as there are at most.

    Raises:
        ValueError: Fewer than 2 test points.
    """
    whole_number("n_subsets", n_subsets, 1)
    n_test = min(n_test, len(task.test))
    if n_test < 2:
        raise bad_value("n_test", "be at least 2: one half tunes, the other reports", n_test)
    membership = random_subsets(task.n_train, n_subsets, task.n_train // 2, seed=0)
    return RetrainingPlan(task, membership, n_seeds, Path(store), n_test)


def estimates(
    methods: Sequence[str | MethodSpec] | None,
    task: Task,
    *,
    store: str | Path,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("lds", "calibration"),
    n_subsets: int = 100,
    n_seeds: int = 2,
    n_models: int = 3,
    n_test: int = 300,
    n_jobs: int = -1,
    engine: str = "auto",
    device: torch.device | str = "cpu",
) -> list[RetrainingEstimate]:
    """The retrainings that `compare` with these arguments would do at most, before any of them is done.

    The store is looked at, and one epoch is timed.

    Raises:
        ValueError: As for `compare`.
        TypeError: As for `compare`.
    """
    device = existing_device(device)
    asked = settle(methods, task, measures)
    plan = halves(task, store, n_subsets, n_seeds, n_test)
    sizes = {"n_subsets": n_subsets, "n_seeds": n_seeds, "n_models": n_models, "n_spiked": 0}
    check(asked, task, n_test=plan.n_test, half=plan.n_test // 2, n_resamples=0, engine=engine, **sizes)
    found = []
    if asked.on_halves:
        found.append(replace(plan.estimate(n_jobs, engine=engine, device=device), purpose="LDS"))
    if "counterfactual" in asked.measures:
        settings = asked.measures["counterfactual"]
        for arm in settings.get("arms", ("proponents",)):
            of_arm = counterfactual_cost(
                task,
                n_methods=len(counterfactual_methods(asked)),
                counts=settings.get("counts", (50, 100, 500)),
                n_test=len(settings.get("test_points", range(settings.get("n_points", 10)))),
                n_seeds=settings.get("n_seeds", 3),
                n_models=n_models,
                n_jobs=n_jobs,
                device=device,
            )
            found.append(replace(of_arm, purpose=f"counterfactual drop, {arm}", at_most=True))
    return found


def _attributed(
    task: Task, store: Path, n_models: int, n_spiked: int, asked: Asked, device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, list[Any]]]:
    """The models, and the earlier checkpoints of their trainings where a spec wants them."""
    models, seeds = {}, {}
    for seed in range(n_models):
        name = f"seed {seed}"
        models[name], seeds[name] = train_attributed(task, seed, store, device=device), seed
    first_seed = 100
    for _ in range(n_spiked):
        model, seed = train_spiked(task, store, first_seed=first_seed, device=device)
        name = f"seed {seed}, stopped on a spike"
        models[name], seeds[name] = model, seed
        first_seed = seed + 1
    n = max(c.n_checkpoints for c in asked.specs) if asked.on_halves else 1
    if n == 1:
        return models, {}
    return models, {
        name: train_checkpoints(task, seed, store, n - 1, device=device) for name, seed in seeds.items()
    }


def _row(spec: MethodSpec, setting: _Setting, first: Row | None) -> Row:
    half, membership, responses = setting.half, setting.membership, setting.responses
    options, methods = _chosen(spec, setting)
    answers = setting.answers(methods, slice(half, None))
    scores = [answer.values for answer in answers]
    reported, n_resamples = responses[..., half:], setting.n_resamples
    result = lds(scores, membership, reported, n_resamples=n_resamples)
    against = None
    if first is not None:
        gap = difference(first.lds, result)
        against = (gap.value, gap.interval)
    calibrated = linearized = None
    if "calibration" in setting.measures:
        calibrated = calibration(scores, membership, reported, n_resamples=n_resamples)
    if "linearized" in setting.measures:
        linearized = linearized_influence_correlation(scores, membership, reported)
    setting.gallery.add(spec.name, methods[0], scores[0])
    return Row(
        name=spec.name,
        options=dict(options),
        lds=result,
        models=list(setting.models),
        against_first=against,
        cost=median_cost([answer.cost(reported.shape[-1]) for answer in answers]),
        calibration=calibrated,
        linearized=linearized,
    )


def _chosen(spec: MethodSpec, setting: _Setting) -> tuple[Mapping[str, Any], list[CachedMethod]]:
    """The grid point with the highest LDS on the tuning half, and the method with it on every model.

    Undefined correlations count as 0, so that silence is not the best answer; a point that ranks nothing at
    all is below every other one.
    """
    half, membership, responses = setting.half, setting.membership, setting.responses
    best: tuple[tuple[bool, float], Mapping[str, Any], list[CachedMethod]] | None = None
    methods: list[CachedMethod] = []
    built: Mapping[str, Any] | None = None
    for options in spec.grid:
        fixed = {name: value for name, value in options.items() if name not in spec.settable}
        if fixed != built:
            methods, built = setting.build(spec, options), fixed
        _set(methods, spec, options)
        value = (False, 0.0)
        if len(spec.grid) > 1:
            tuning = [a.values for a in setting.answers(methods, slice(0, half))]
            found = lds(tuning, membership, responses[..., :half], n_resamples=0)
            value = (not found.ranks_nothing, found.undefined_as_zero)
        if best is None or value > best[0]:
            best = (value, options, methods)
    assert best is not None, "a grid has at least one point"
    _set(best[2], spec, best[1])
    return best[1], best[2]


def _counterfactual(
    asked: Asked,
    task: Task,
    models: Mapping[str, nn.Module],
    points: range,
    common: Mapping[str, Any],
    **run: Any,
) -> list[CounterfactualRow]:
    """Both arms, where both are asked for; the first of `points` unless the options name others."""
    settings = {**run, **asked.measures["counterfactual"]}
    arms, n_points = settings.pop("arms", ("proponents",)), settings.pop("n_points", 10)
    settings.pop("methods", None)
    settings.setdefault("test_points", points[:n_points])
    return [
        row
        for arm in arms
        for row in measure_counterfactual(
            task, counterfactual_methods(asked), models, opponents=arm == "opponents", **common, **settings
        )
    ]


def _set(methods: Sequence[CachedMethod], spec: MethodSpec, options: Mapping[str, Any]) -> None:
    """Set what needs no new fit."""
    for kept in methods:
        for name in spec.settable & options.keys():
            setattr(kept.method, name, options[name])


def _detect(cls: Any) -> Any:
    return lambda model, dataset: cls(model, dataset).mislabel_scores()
