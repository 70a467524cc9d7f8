"""`compare`: methods on one task, with the same models, subsets, test points and response for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...influence.chance import at_chance
from ...responses import multiclass_logits
from ...system.fingerprints import weights_fingerprint
from ..retraining.estimate import RetrainingEstimate
from ..retraining.store import Fingerprints
from ..retraining.training import logits_of, mean_residual
from ..system import environment
from ..tasks.task import Task
from ..tasks.task_loss import response_in_words
from .plan import MEASURES, settle
from .results import Comparison
from .runs.lds import options_so_far, retrained
from .shared.methods import MethodSpec
from .shared.question import Question
from .shared.shared import Shared

#: Measures whose rows are a field of `Comparison`.
_FIELDS = ("rows", "retrainings", "counterfactual", "mislabel", "leakage")


def compare(
    methods: Sequence[str | MethodSpec] | None,
    task: Task,
    *,
    store: str | Path,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("lds", "calibration"),
    retrainings: Sequence[float] | None = None,
    parts: int = 2,
    n_subsets: int = 100,
    n_seeds: int = 2,
    n_models: int | None = None,
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

    The protocol of LDS: `n_subsets` random halves of the training set, and `n_seeds` models retrained from
    scratch on each; the response is the margin of the true class (`losses.Loss.responses[0]` for other
    losses). Each attributed model is scored alone. A method with a grid of options takes those with the
    highest LDS on the first half of the test points; the second half is reported. The other measures use
    the options that were chosen. If no measure needs the retrained halves, none are retrained and a method
    with a grid takes its default options. Halves with a retraining that diverges are left out and counted.
    Arguments that cannot work are refused before anything is trained.

    Args:
        methods: Names from `METHODS`, or specs of your own; None takes those of `DEFAULT_METHODS` that can
            be run.
        task: The task.
        store: Folder of the retrainings, the trained models and the scores: what is there is not computed
            again.
        measures: Names from `MEASURES`, or a mapping from names to options. The options are those of
            `measure_counterfactual`, `measure_mislabel` and `measure_leakage`; "counterfactual" also takes
            `methods` (names), `arms` ("proponents", "opponents") and `n_points` (10 of the reported test
            points); "mislabel" also takes `detectors` (names from `DETECTORS`; default: all).
        retrainings: Budgets, in trainings on the whole training set, at which LDS is measured. 0 is one
            model and the checkpoints along its training; B is models of the parts of B random partitions,
            the same for all methods. None measures none; `measures={"retrainings": {...}}` has more options.
            It is measured for `methods`, or by default for STRIDE, EKFAC, TRAK, DiagonalEKFAC and TracIn.
        parts: Parts of each partition, for `retrainings`.
        n_subsets: Number of random halves.
        n_seeds: Retrainings of each half; the ceiling needs at least 2.
        n_models: Attributed models, trained with seeds 0, 1, ...; by default 3. A number is also that of the
            measures that train models of their own, "mislabel" and "leakage", whose default is 1.
        n_spiked: Additional attributed models, stopped on a spike of their training loss.
        n_test: Test points, both halves together.
        n_jobs: Processes for the retrainings; -1 takes all cores.
        engine: How the halves are retrained; see `RetrainingPlan.execute`.
        device: Where every model is trained and every method is run.
        options: By name of a method, options that are used instead of being chosen, such as the
            `Row.options` of another comparison.
        n_resamples: Bootstrap draws for the intervals; 0 leaves them out.
        show_progress: Whether to show bars.

    Raises:
        ValueError: A method, measure or option does not exist; two methods have one name; a size exceeds the
            task; the network cannot read the inputs or labels; or more than a tenth of the halves diverge.
        TypeError: One name instead of a sequence of names.
        ImportError: A method that is named needs an extra that is not installed.

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
    return answer(
        settle(
            methods,
            task,
            store=store,
            measures=measures,
            retrainings=retrainings,
            parts=parts,
            options=options,
            n_subsets=n_subsets,
            n_seeds=n_seeds,
            n_models=n_models,
            n_spiked=n_spiked,
            n_test=n_test,
            n_jobs=n_jobs,
            engine=engine,
            device=device,
            n_resamples=n_resamples,
            show_progress=show_progress,
        )
    )


def answer(question: Question) -> Comparison:
    """Run every measure of a question.

    Raises:
        ValueError: More than a tenth of the halves diverge, or a retraining of the counterfactual drop does.
    """
    shared, task = Shared(question), question.task
    measured: dict[str, list[Any]] = {"rows": []}
    for name in question.measures:
        measured[MEASURES[name].part] = list(MEASURES[name].run(shared))
    ours = {part: measured.pop(part) for part in _FIELDS if part in measured}
    return Comparison(
        task=task.name,
        note=" ".join(part for part in (task.note, question.note, *_learned_nothing(shared)) if part),
        protocol=_protocol(shared),
        environment=environment.describe(question.device),
        skipped=shared.skipped,
        gallery=shared.gallery.to_dict(),
        others=measured,
        **ours,
    )


def planned_trainings(question: Question) -> list[RetrainingEstimate]:
    """Every training that `answer` would start. Nothing is trained but a few batches, which are timed.

    The counts are exact, unless `RetrainingEstimate.at_most` says why they are an upper bound.
    """
    shared = Shared(question)
    found = (estimate for name in question.measures for estimate in MEASURES[name].trainings(shared))
    return list({id(estimate): estimate for estimate in found}.values())


def comparison_sizes(preset: str) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Arguments of `compare` for a preset of the task: sizes, and options of the measures.

    "smoke" shows in minutes that everything runs; its intervals are wide.
    """
    if preset != "smoke":
        return {"n_subsets": 100, "n_seeds": 2, "n_test": 300}, {}
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
        "mislabel": {"n_held_out": 100, "n_models": 1},
        "leakage": {"counts": (10,), "kinds": ("exact",), "n_models": 1},
    }
    return sizes, measures


def _protocol(shared: Shared) -> dict[str, Any]:
    """Entry "protocol" of results.json: subsets, seeds, test points, models and options."""
    question, task, plan = shared.question, shared.question.task, shared.question.halves
    left_out = retrained(shared).left_out if question.on_halves else []
    on_halves = {
        "n_subsets": plan.membership.shape[0] - len(left_out),
        "n_seeds": plan.n_seeds,
        "n_test_tuning": question.reported.start,
        "n_test_reported": len(question.reported),
    }
    models, (x, y) = shared.models_so_far, task.train.tensors
    return {
        "n_train": task.n_train,
        **(on_halves if question.on_halves else dict.fromkeys(on_halves, 0)),
        "left_out": left_out,
        "subset_size": task.n_train // 2,
        "options": options_so_far(shared),
        **({"options_chosen_on": question.chosen_on} if question.chosen_on else {}),
        "response": response_in_words(task.loss),
        "models": {name: mean_residual(model, x, y, task.loss) for name, model in models.items()},
        "n_resamples": question.n_resamples,
        "measures": question.measures,
        "training": asdict(task.training),
        "fingerprints": {
            "task": Fingerprints(task).of(0, None, ""),
            "models": {name: weights_fingerprint(model) for name, model in models.items()},
        },
    }


def _learned_nothing(shared: Shared) -> list[str]:
    """A warning for each attributed model that is no better than predicting one class for all."""
    if not shared.question.task.has_classes:
        return []
    x, y = shared.question.task.train.tensors
    found = []
    for name, model in shared.models_so_far.items():
        why = at_chance(multiclass_logits(logits_of(model, x)).argmax(1).cpu(), y)
        if why is not None:
            found.append(f"Attributed model {name} has learned nothing: {why}. Its scores mean nothing.")
    return found
