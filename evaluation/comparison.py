"""Owns the comparison of methods on one task: the same models, subsets, test points and response for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from .. import adapters
from ..errors import bad_choice, bad_value
from ..restoring import weights_fingerprint
from ..subsets import Membership, random_subsets
from . import environment
from .attributed_training import train_attributed, train_checkpoints, train_spiked
from .base_training import mean_residual
from .calibration import CalibrationResult, calibration
from .contenders import DEFAULT_METHODS, Contender, find_contender
from .cost import Build, Cost, forward_seconds, median_cost
from .counterfactual_retraining import CounterfactualRow, measure_counterfactual
from .counterfactual_retraining import cost as counterfactual_cost
from .gallery import Gallery
from .kept_answers import Answer, KeptMethod
from .leakage_benchmark import LeakageRow, measure_leakage
from .linear_datamodeling import LDSResult, difference, lds, margins, plain
from .linearized_influence import LinearizedInfluenceResult, linearized_influence_correlation
from .mislabel_benchmark import MislabelRow, measure_mislabel
from .retraining import RetrainingPlan
from .retraining_estimate import RetrainingEstimate
from .run_store import Fingerprints
from .statistics import Interval
from .tasks import Task

if TYPE_CHECKING:
    import pandas

#: Of `Comparison.to_dict()`; increased whenever a reader of results.json must know.
FORMAT = 1
#: What can be measured.
MEASURES = ("lds", "calibration", "linearized", "counterfactual", "mislabel", "leakage")
#: Those that are read off retrained halves, and come with the choice of options.
_OF_HALVES = frozenset({"lds", "calibration", "linearized"})
#: Detectors of label noise that need no influence.
DETECTORS = {
    "loss": adapters.LossDetector,
    "ridge leave-one-out": adapters.RidgeLeaveOneOut,
    "confident learning": adapters.ConfidentLearning,
}


@dataclass(frozen=True)
class Row:
    """One method's figures on the reporting half of the test points.

    Attributes:
        name: The method.
        options: The grid point that the tuning half chose.
        lds: Linear datamodeling score.
        models: Names of the attributed models, in the order of `lds.per_model`.
        against_first: LDS of the first row less this one's, with its paired interval; None for the first.
        cost: Medians over models; queries are the reported test points.
        calibration: Whether effects are right in size.
        linearized: C.1 of the paper.
    """

    name: str
    options: dict[str, Any]
    lds: LDSResult
    models: list[str]
    against_first: tuple[float, Interval | None] | None
    cost: Cost
    calibration: CalibrationResult | None = None
    linearized: LinearizedInfluenceResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        against = None
        if self.against_first is not None:
            value, interval = self.against_first
            spread = None if interval is None else [interval.low, interval.high]
            against = {"value": value, "interval": spread}
        parts = {
            name: None if part is None else part.to_dict()
            for name, part in (
                ("lds", self.lds),
                ("cost", self.cost),
                ("calibration", self.calibration),
                ("linearized", self.linearized),
            )
        }
        return {
            "name": self.name,
            "options": self.options,
            "models": self.models,
            **parts,
            "first_row_less_this": against,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        task: Name of the task.
        note: What must be read beside the figures.
        rows: One per method: LDS, cost and what goes with them; empty where no halves were retrained.
        protocol: Subsets, seeds, test points and models.
        environment: Versions and hardware.
        counterfactual: One per method and arm, where measured.
        mislabel: One per method and way of ranking, where measured.
        leakage: One per method and planted set, where measured.
        skipped: Methods that were left out, and why.
        gallery: What each method shows for a few test points, with pictures.

    >>> Comparison("digits-300", "", rows=[], protocol={}, environment={}).frame("leakage").shape
    (0, 0)
    """

    task: str
    note: str
    rows: list[Row]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    counterfactual: list[CounterfactualRow] = field(default_factory=list)
    mislabel: list[MislabelRow] = field(default_factory=list)
    leakage: list[LeakageRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    gallery: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts: tuple[Sequence[Any], ...] = (self.counterfactual, self.mislabel, self.leakage)
        names = ("counterfactual", "mislabel", "leakage")
        return plain(
            {
                "format": FORMAT,
                "task": self.task,
                "note": self.note,
                "summary": self.summary(),
                "protocol": self.protocol,
                "environment": self.environment,
                "skipped": self.skipped,
                "rows": [row.to_dict() for row in self.rows],
                **{n: [r.to_dict() for r in part] for n, part in zip(names, parts, strict=True)},
                "gallery": self.gallery,
            }
        )

    def summary(self) -> list[str]:
        """Sentences that name a winner only where the paired interval excludes zero."""
        if not self.rows:
            return ["No halves were retrained: nothing is said of LDS, and no options were chosen here."]
        first, *others = self.rows
        sentences = []
        ahead, behind, open_ = [], [], []
        for row in others:
            assert row.against_first is not None
            interval = row.against_first[1]
            if interval is not None and interval.low > 0:
                ahead.append(row.name)
            elif interval is not None and interval.high < 0:
                behind.append(row.name)
            else:
                open_.append(row.name)
        share = "" if not first.lds.ceiling else f", {first.lds.value / first.lds.ceiling:.0%} of the ceiling"
        sentences.append(f"{first.name} has an LDS of {first.lds.value:.3f}{share}.")
        if ahead:
            sentences.append(f"It predicts retrainings better than {_names(ahead)}.")
        if behind:
            sentences.append(f"It predicts them worse than {_names(behind)}.")
        if open_:
            sentences.append(f"Between it and {_names(open_)} these data do not decide.")
        return sentences

    def frame(self, measure: str = "lds") -> pandas.DataFrame:
        """The figures of one measure as a pandas frame, a row a method.

        Args:
            measure: "lds" (with cost, calibration and C.1 where measured), "counterfactual", "mislabel" or
                "leakage".

        Raises:
            ValueError: Another measure.
        """
        import pandas

        parts: dict[str, Sequence[Any]] = {
            "lds": self.rows,
            "counterfactual": self.counterfactual,
            "mislabel": self.mislabel,
            "leakage": self.leakage,
        }
        if measure not in parts:
            raise bad_choice("measure", measure, list(parts))
        return pandas.json_normalize([row.to_dict() for row in parts[measure]])

    def __repr__(self) -> str:
        lines = [f"{row.name}: {row.lds!r}" for row in self.rows]
        return "\n".join([f"{self.task}. {' '.join(self.summary())}", *lines])

    def _repr_html_(self) -> str:
        from .report import comparison_table

        return comparison_table(self.to_dict())


@dataclass(frozen=True)
class _Setting:
    """What all methods share."""

    task: Task
    models: Mapping[str, nn.Module]
    checkpoints: Mapping[str, list[Any]]
    test: tuple[Any, Any]
    half: int
    membership: Membership
    responses: NDArray[Any]
    n_resamples: int
    measures: frozenset[str]
    store: Path
    forward: float
    gallery: Gallery

    def build(self, contender: Contender, options: Mapping[str, Any]) -> list[KeptMethod]:
        """The method on every attributed model."""
        found = []
        for name, model in self.models.items():
            extra: dict[str, Any] = {}
            if contender.n_checkpoints > 1:
                extra["checkpoints"] = [*self.checkpoints[name], model.state_dict()]
            given = {**options, **extra}
            found.append(KeptMethod(contender, model, self.task, given, self.store, self.forward))
        return found

    def answers(self, methods: Sequence[KeptMethod], rows: slice) -> list[Answer]:
        """`(n_test, n_train)` of each model for some test points."""
        x, y = (t[rows] for t in self.test)
        return [method.margins((x, y)) for method in methods]


def compare(
    methods: Sequence[str | Contender] | None,
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
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_resamples: int = 1000,
    show_progress: bool = False,
) -> Comparison:
    """Compare methods on a task.

    The protocol: `n_subsets` random halves of the training set, `n_seeds` retrainings each from
    scratch; the response is the margin of the true class; every attributed model is scored alone. The
    first half of the test points chooses among the grid of a method by LDS, the second half is
    reported; the other measures take the options that were chosen. Where neither LDS nor what is read off
    the same halves is asked for, none are retrained, and a method takes the first point of its grid unless
    `options` has another.

    Args:
        methods: Names from `CONTENDERS`, or contenders of your own; None takes `DEFAULT_METHODS` as far
            as their extras are installed.
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
        options: By name of a method, options that are taken as they are instead of being chosen; those
            that another comparison chose are in its `Row.options`.
        n_resamples: Of the bootstraps.
        show_progress: Whether to show bars.

    Raises:
        ValueError: A method or measure that does not exist, or too few test points.

    >>> import tempfile
    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.models import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> sizes = {"n_subsets": 4, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1}
    >>> with tempfile.TemporaryDirectory() as store:
    ...     result = compare(["STRIDE", "Random"], task, store=store, measures=["lds"], **sizes)
    >>> [row.name for row in result.rows]
    ['STRIDE', 'Random']
    """
    wanted, options = _wanted(measures), options or {}
    every = [find_contender(m) for m in (DEFAULT_METHODS if methods is None else methods)]
    contenders = [
        replace(c, grid=[options[c.name]]) if c.name in options else c
        for c in every
        if methods is not None or c.available
    ]
    on_halves, store = bool(_OF_HALVES & wanted.keys()), Path(store)
    plan = halves(task, store, n_subsets, n_seeds, n_test)
    half, n_test = plan.n_test // 2, plan.n_test
    models: dict[str, nn.Module] = {}
    if on_halves or "counterfactual" in wanted:
        models, checkpoints = _attributed(task, store, n_models, n_spiked, contenders if on_halves else ())
    shown = models if on_halves else {}
    gallery = Gallery(task, shown, range(half, n_test), rank_suspects="mislabel" not in wanted)
    rows: list[Row] = []
    if on_halves:
        x_test, y_test = (t[:n_test] for t in task.test.tensors)
        responses = margins(plan.execute(n_jobs, show_progress, engine=engine), y_test.numpy())
        setting = _Setting(
            task=task,
            models=models,
            checkpoints=checkpoints,
            test=(x_test, y_test),
            half=half,
            membership=plan.membership,
            responses=responses,
            n_resamples=n_resamples,
            measures=frozenset(wanted),
            store=store,
            forward=forward_seconds(next(iter(models.values())), task.train),
            gallery=gallery,
        )
        bar = tqdm(contenders, desc="methods", disable=not show_progress)
        for contender in bar:
            bar.set_postfix_str(contender.name)
            rows.append(_row(contender, setting, rows[0] if rows else None))
    builds: dict[str, Build] = {c.name: c for c in contenders if c.n_checkpoints == 1}
    common: dict[str, Any] = {
        "store": store,
        "options": {c.name: c.grid[0] for c in contenders} | {row.name: row.options for row in rows},
        "n_resamples": n_resamples,
    }
    parts: dict[str, Any] = {}
    taken = {c.name for c in contenders}
    skipped = {c.name: f"needs {c.needs}" for c in every if c.name not in taken}
    if "counterfactual" in wanted:
        settings = {"n_jobs": n_jobs, **wanted["counterfactual"]}
        last = half + settings.pop("n_points", 10)  # none that options were chosen on
        settings.setdefault("test_points", range(half, min(last, n_test)))
        arms = settings.pop("arms", ("proponents",))
        chosen = settings.pop("methods", None) or list(builds)
        kept = {n: b for n, b in builds.items() if n in {*chosen, "ClassRandom", "Similarity"}}
        parts["counterfactual"] = [
            row
            for arm in arms
            for row in measure_counterfactual(
                task,
                kept,
                models,
                opponents=arm == "opponents",
                show_progress=show_progress,
                **common,
                **settings,
            )
        ]
    if "mislabel" in wanted:
        settings = dict(wanted["mislabel"])
        chosen = _detectors(settings.pop("detectors", DETECTORS))
        usable = [name for name in chosen if name != "confident learning" or find_spec("cleanlab")]
        skipped.update({name: "needs cleanlab" for name in chosen if name not in usable})
        parts["mislabel"] = measure_mislabel(
            task, builds, detectors={name: _detect(DETECTORS[name]) for name in usable}, **common, **settings
        )
    if "leakage" in wanted:
        parts["leakage"] = measure_leakage(task, builds, **common, **wanted["leakage"])
    protocol = {
        "n_train": task.n_train,
        "n_subsets": n_subsets if on_halves else 0,
        "subset_size": task.n_train // 2,
        "n_seeds": n_seeds if on_halves else 0,
        "n_test_tuning": half if on_halves else 0,
        "n_test_reported": n_test - half if on_halves else 0,
        "options": common["options"],
        "response": "margin of the true class",
        "models": {name: mean_residual(m, *task.train.tensors) for name, m in models.items()},
        "n_resamples": n_resamples,
        "measures": {name: dict(options) for name, options in wanted.items()},
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
        environment.describe(),
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
    n_test = min(n_test, len(task.test))
    if n_test < 2:
        raise bad_value("n_test", "be at least 2: one half tunes, the other reports", n_test)
    membership = random_subsets(task.n_train, n_subsets, task.n_train // 2, seed=0)
    return RetrainingPlan(task, membership, n_seeds, Path(store), n_test)


def estimates(
    methods: Sequence[str | Contender] | None,
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
) -> list[RetrainingEstimate]:
    """The retrainings that `compare` with these arguments would do at most, before any of them is done.

    The store is looked at, and one epoch is timed.
    """
    wanted = _wanted(measures)
    names = [find_contender(m).name for m in (DEFAULT_METHODS if methods is None else methods)]
    found = []
    if _OF_HALVES & wanted.keys():
        of_halves = halves(task, store, n_subsets, n_seeds, n_test).estimate(n_jobs, engine=engine)
        found.append(replace(of_halves, purpose="LDS"))
    if "counterfactual" in wanted:
        settings = wanted["counterfactual"]
        kept = {*settings.get("methods", names)} | ({"ClassRandom", "Similarity"} & set(names))
        for arm in settings.get("arms", ("proponents",)):
            of_arm = counterfactual_cost(
                task,
                n_methods=len(kept),
                counts=settings.get("counts", (50, 100, 500)),
                n_test=len(settings.get("test_points", range(settings.get("n_points", 10)))),
                n_seeds=settings.get("n_seeds", 3),
                n_models=n_models,
                n_jobs=n_jobs,
            )
            found.append(replace(of_arm, purpose=f"counterfactual drop, {arm}", at_most=True))
    return found


def _wanted(measures: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    wanted = dict(measures) if isinstance(measures, Mapping) else {measure: {} for measure in measures}
    for measure in wanted:
        if measure not in MEASURES:
            raise bad_choice("measures", measure, MEASURES)
    return wanted


def _detectors(names: Iterable[str]) -> list[str]:
    chosen = list(names)
    for name in chosen:
        if name not in DETECTORS:
            raise bad_choice("detectors", name, list(DETECTORS))
    return chosen


def _attributed(
    task: Task, store: Path, n_models: int, n_spiked: int, contenders: Sequence[Contender]
) -> tuple[dict[str, nn.Module], dict[str, list[Any]]]:
    """The models, and the earlier checkpoints of their trainings where a contender wants them."""
    models, seeds = {}, {}
    for seed in range(n_models):
        name = f"seed {seed}"
        models[name], seeds[name] = train_attributed(task, seed, store), seed
    first_seed = 100
    for _ in range(n_spiked):
        model, seed = train_spiked(task, store, first_seed=first_seed)
        name = f"seed {seed}, stopped on a spike"
        models[name], seeds[name] = model, seed
        first_seed = seed + 1
    n = max((c.n_checkpoints for c in contenders), default=1)
    if n == 1:
        return models, {}
    return models, {name: train_checkpoints(task, seed, store, n - 1) for name, seed in seeds.items()}


def _row(contender: Contender, setting: _Setting, first: Row | None) -> Row:
    half, membership, responses = setting.half, setting.membership, setting.responses
    best: tuple[float, Mapping[str, Any], list[KeptMethod]] | None = None
    methods: list[KeptMethod] = []
    built: Mapping[str, Any] | None = None
    for options in contender.grid:
        fixed = {name: value for name, value in options.items() if name not in contender.settable}
        if fixed != built:
            methods, built = setting.build(contender, options), fixed
        _set(methods, contender, options)
        value = 0.0
        if len(contender.grid) > 1:
            tuning = [a.values for a in setting.answers(methods, slice(0, half))]
            value = lds(tuning, membership, responses[..., :half], n_resamples=0).value
        if best is None or value > best[0]:
            best = (value, options, methods)
    assert best is not None, "a grid has at least one point"
    _set(best[2], contender, best[1])
    answers = setting.answers(best[2], slice(half, None))
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
    cost = median_cost([answer.cost(reported.shape[-1]) for answer in answers])
    setting.gallery.add(contender.name, best[2][0], scores[0])
    return Row(
        name=contender.name,
        options=dict(best[1]),
        lds=result,
        models=list(setting.models),
        against_first=against,
        cost=cost,
        calibration=calibrated,
        linearized=linearized,
    )


def _set(methods: Sequence[KeptMethod], contender: Contender, options: Mapping[str, Any]) -> None:
    """Set what needs no new fit."""
    for kept in methods:
        for name in contender.settable & options.keys():
            setattr(kept.method, name, options[name])


def _detect(cls: Any) -> Any:
    return lambda model, dataset: cls(model, dataset).mislabel_scores()


def _names(names: Sequence[str]) -> str:
    comma = "; " if any("," in name for name in names) else ", "
    return names[0] if len(names) == 1 else f"{comma.join(names[:-1])} and {names[-1]}"
