"""LDS against the retraining budget: what is trained, who is given what, and what each row is."""

from __future__ import annotations

import json
import re
from importlib import resources

import jsonschema
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Checkpoint, refine
from stride_captum.adapters import DiagonalEKFAC, Random
from stride_captum.evaluation import MethodSpec, TaskTraining, compare, load_task
from stride_captum.evaluation.comparison.compare import answer, planned_trainings
from stride_captum.evaluation.comparison.plan import settle
from stride_captum.evaluation.comparison.runs import ladder
from stride_captum.evaluation.comparison.runs import lds as lds_rows
from stride_captum.evaluation.comparison.runs.contenders import contender, grid_for
from stride_captum.evaluation.comparison.runs.retrainings import Retrainings
from stride_captum.evaluation.comparison.shared.methods import METHODS, OUT_OF_SAMPLE, adapter
from stride_captum.evaluation.comparison.shared.shared import Shared
from stride_captum.evaluation.measures.calibration import calibration
from stride_captum.evaluation.measures.linear_datamodeling import lds
from stride_captum.evaluation.report.budget_figure import budget_steps
from stride_captum.evaluation.report.html import write_comparison
from stride_captum.evaluation.retraining import attributed_models, cross_fitting, parts, task_parts, workers
from stride_captum.evaluation.retraining.attributed_models import (
    log_epochs,
    train_attributed,
    train_checkpoints,
)
from stride_captum.evaluation.retraining.plan import RetrainingPlan
from stride_captum.evaluation.retraining.task_parts import HALVES, Split, cross_fit
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task
from stride_captum.evaluation.tasks.task_loss import responses

EPOCHS = 4
FEW = {"n_subsets": 8, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1, "engine": "processes"}
GIVEN = {"temperature": 9.0, "damping": 5.0}
SCHEMA = json.loads(
    (resources.files("stride_captum.evaluation.report") / "templates/results.schema.json").read_text("utf-8")
)


@pytest.fixture(scope="module")
def task():
    training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=EPOCHS)
    return load_task("synthetic", preset="smoke", training=training)


@pytest.fixture(scope="module")
def found(task, tmp_path_factory):
    """A ladder over two methods."""
    store = tmp_path_factory.mktemp("ladder")
    names = ["STRIDE", "TracIn"]
    result = compare(names, task, store=store, measures=["lds"], retrainings=[0, 1, 2], n_resamples=20, **FEW)
    return store, result


@pytest.fixture
def trained(monkeypatch):
    """The number of examples and epochs of each training."""
    seen = []
    for module in (attributed_models, workers, task_parts):

        def counted(build_model, x, y, training, seed, _train=module.train_model, **options):
            seen.append((len(x), training.epochs))
            return _train(build_model, x, y, training, seed, **options)

        monkeypatch.setattr(module, "train_model", counted)
    return seen


class TestTrainings:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("methods", "settings", "n_parts"),
        [
            (["STRIDE"], {"budgets": [0, 1, 2]}, 2 * 2),
            # The row's halves are the first ones of the ladder, and are not trained twice.
            (["STRIDE", "STRIDE, cross-fitted"], {"budgets": [2]}, 2 * 2),
            (["STRIDE", "STRIDE, cross-fitted"], {"budgets": [1], "parts": 3}, 3 + 2),
            (["STRIDE"], {"budgets": [0.5, 1.0], "epochs": 2}, 2 * 2),
        ],
    )
    def test_are_counted_before_they_are_done(self, task, tmp_path, trained, methods, settings, n_parts):
        measures = {"lds": {}, "retrainings": {"methods": ["STRIDE"], **settings}}
        question = settle(methods, task, store=tmp_path, measures=measures, **FEW)
        planned = planned_trainings(question)
        parts = [estimate for estimate in planned if estimate.purpose.startswith("cross-fitted")]
        assert sum(estimate.n_missing for estimate in parts) == n_parts
        trained.clear()  # of the epochs that were timed
        rows = answer(question).retrainings
        assert sum(estimate.n_missing for estimate in planned) == len(trained)
        assert sum(estimate.n_missing for estimate in planned_trainings(question)) == 0
        # Examples times epochs of all parts of the highest budget, in trainings on everything.
        wanted = settings.get("epochs", EPOCHS)
        n = task.n_train // settings.get("parts", 2)
        halves = [(size, epochs) for size, epochs in trained if (size, epochs) == (n, wanted)]
        judged = 0 if (n, wanted) != (task.n_train // 2, EPOCHS) else FEW["n_subsets"]
        cost = sum(size * epochs for size, epochs in halves[judged:]) / (task.n_train * EPOCHS)
        assert max(row.trainings for row in rows) == pytest.approx(cost) == max(settings["budgets"])

    @pytest.mark.slow
    def test_subsets_that_judge_are_refused(self, task, tmp_path, monkeypatch):
        question = settle(["STRIDE"], task, store=tmp_path, retrainings=[1], **FEW)
        judge = question.halves.membership[3]
        rest = sparse.csr_matrix(1 - judge.toarray())
        monkeypatch.setattr(parts, "partition", lambda *args, **options: sparse.vstack([judge, rest]).tocsr())
        with pytest.raises(ValueError, match="hold subsets whose models have not entered the scores; got 1"):
            answer(question)

    @pytest.mark.slow
    def test_a_method_that_memorizes_its_halves_gains_nothing(self, task, tmp_path):
        def noise(checkpoint, n):
            """What it says of a half, `(n,)`."""
            return torch.randn(n, generator=torch.Generator().manual_seed(sum(checkpoint.seen)))

        class Memorizer(Random):
            """Its scores add up to noise of its own on each half that it is given."""

            def influence(self, inputs, *args, **options):
                total = torch.zeros(len(inputs[1]), task.n_train)
                for checkpoint in self.checkpoints:
                    signs = torch.full((task.n_train,), -1.0)
                    signs[list(checkpoint.seen)] = 1.0
                    total += noise(checkpoint, len(total))[:, None] * signs
                return total

        spec, few = MethodSpec("Memorizer", adapter(Memorizer)), {**FEW, "n_subsets": 60}
        measures = {"retrainings": {"budgets": [4], "methods": ["Memorizer"]}}
        question = settle([spec], task, store=tmp_path, measures=measures, n_resamples=0, **few)
        (row,) = Retrainings().run(Shared(question))
        models = cross_fit(task, 0, 4, tmp_path)
        method = Memorizer(task.build_model(), task.train, checkpoints=models.checkpoints)
        scores = method.influence(tuple(t[:10] for t in task.test.tensors))
        own = torch.stack([noise(checkpoint, 10) for checkpoint in models.checkpoints]).numpy()
        own -= own.reshape(4, 2, 10)[:, ::-1].reshape(8, 10)  # less that of the half left out
        assert lds(scores, models.membership, own, n_resamples=0).value > 0.9
        assert abs(row.lds.value) < 0.15


@pytest.mark.slow
class TestRows:
    def test_budgets_sources_and_costs(self, found):
        rows = found[1].retrainings
        steps = [(row.source, row.trainings, row.n_models) for row in rows if row.name == "STRIDE"]
        assert steps == [
            ("last checkpoint", 0.0, 1),
            ("checkpoints", 0.0, 4),  # epochs 1, 2, 3 and the last
            ("cross-fitted", 1.0, 2),
            ("checkpoints and parts", 1.0, 6),
            ("cross-fitted", 2.0, 4),
            ("checkpoints and parts", 2.0, 8),
            ("refined", 2.0, 8),
        ]
        assert [(r.source, r.trainings) for r in rows if r.name == "TracIn" + OUT_OF_SAMPLE] == [
            s[:2] for s in steps[:6]
        ]
        assert all(row.against_first is None for row in rows[:7])
        assert all(row.against_first is not None for row in rows[7:])
        assert [row.over_last is None for row in rows] == [True, *[False] * 6, True, *[False] * 5]
        last, two = rows[0], rows[4]
        assert two.over_last.value == pytest.approx(two.lds.undefined_as_zero - last.lds.undefined_as_zero)
        assert rows[11].against_first.value == pytest.approx(
            two.lds.undefined_as_zero - rows[11].lds.undefined_as_zero
        )
        assert two.cost.fit_seconds > rows[2].cost.fit_seconds

    def test_scores_are_those_of_a_method_that_is_given_all_models(self, found, task):
        store, result = found
        row = next(r for r in result.retrainings if r.trainings == 2 and r.source == "cross-fitted")
        refined = next(r for r in result.retrainings if r.source == "refined")
        models, model = cross_fit(task, 0, 2, store), train_attributed(task, 0, store)
        batch = tuple(t[10:20] for t in task.test.tensors)
        method = STRIDE(model, task.train, checkpoints=models.checkpoints, operators=_operators(row))
        scores = method.influence(batch, normalize=row.normalize)
        plan = settle(["STRIDE"], task, store=store, **FEW).halves
        margins = _margins(plan, task)[:, 10:]
        assert row.lds.value == pytest.approx(lds(scores, plan.membership, margins, n_resamples=0).value)
        both = next(r for r in result.retrainings if r.source == "checkpoints and parts" and r.trainings == 2)
        along = train_checkpoints(task, 0, store, log_epochs(task.training.epochs))
        every = [*along, model.state_dict(), *models.checkpoints]
        whole = STRIDE(model, task.train, checkpoints=every, operators=_operators(both))
        found_with_all = whole.influence(batch, normalize=both.normalize)
        wanted = lds(found_with_all, plan.membership, margins, n_resamples=0).value
        assert both.lds.value == pytest.approx(wanted, abs=1e-6)
        better = refine(found_with_all, models.membership, models.measured(model, batch)).scores
        wanted = lds(better, plan.membership, margins, n_resamples=0).value
        assert refined.lds.value == pytest.approx(wanted, abs=1e-6)
        size = calibration(better, plan.membership, margins, n_resamples=0).slope
        assert refined.calibration.slope == pytest.approx(size, rel=1e-4)
        assert refined.calibration.interval.low < size < refined.calibration.interval.high
        if row.normalize is not None:  # scores of unit deviation have no unit to compare
            assert row.calibration is None
        else:
            size = calibration(scores, plan.membership, margins, n_resamples=0).slope
            assert row.calibration.slope == pytest.approx(size, rel=1e-4)

    def test_scores_are_refined_by_the_models_that_were_paid(self, found, task, monkeypatch):
        store, given = found[0], []

        def spied(scores, membership, measured):
            given.append((membership, measured))
            return refine(scores, membership, measured)

        monkeypatch.setattr(ladder, "refine", spied)
        measures = {"retrainings": {"budgets": [1, 2, 3], "methods": ["STRIDE"]}}
        question = settle(["STRIDE"], task, store=store, measures=measures, n_resamples=0, **FEW)
        rows = Retrainings().run(Shared(question))
        assert [row.trainings for row in rows if row.source == "refined"] == [2.0, 3.0]
        models, model = cross_fit(task, 0, 3, store), train_attributed(task, 0, store)
        wanted = models.measured(model, tuple(t[10:20] for t in task.test.tensors))
        for (membership, measured), n in zip(given, (4, 6), strict=True):
            assert np.array_equal(membership.toarray(), models.membership[:n].toarray())
            np.testing.assert_allclose(measured, wanted[:, :n])

    def test_all_methods_have_the_same_models(self, task, tmp_path):
        given: dict[str, list[list[bytes]]] = {"a": [], "b": []}

        def spy(name):
            def build(model, data, options):
                states = [getattr(c, "weights", c) for c in options.get("checkpoints", [])]
                given[name].append([next(iter(s.values())).numpy().tobytes() for s in states])
                return Random(model, data, checkpoints=options.get("checkpoints"))

            return MethodSpec(name, build, cache_key=name)

        compare(
            [spy("a"), spy("b")], task, store=tmp_path, measures=["lds"], retrainings=[0, 2], n_resamples=0,
            **FEW,
        )  # fmt: skip
        assert given["a"] == given["b"]
        assert {len(states) for states in given["a"]} >= {0, 4, 2}

    def test_options_of_checkpoints_do_not_depend_on_the_budgets_that_are_paid(
        self, task, tmp_path, monkeypatch
    ):
        chosen = []

        def spied(method, *args, **options):
            name = next(iter(method.shared.models))
            chosen.append(len(method.checkpoints(name) or []))
            return choose(method, *args, **options)

        choose = ladder.choose
        monkeypatch.setattr(ladder, "choose", spied)
        measures = {"retrainings": {"methods": ["TracIn"], "budgets": [0, 1]}}
        question = settle(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
        Retrainings().run(Shared(question))
        assert chosen == [0, 4, 2]

    def test_options_that_no_measure_asks_for_are_not_chosen(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(lds_rows, "_row", lambda *args: pytest.fail("a row that nobody asked for"))
        measures = {"retrainings": {"methods": ["STRIDE"], "budgets": [0]}}
        methods = ["STRIDE (tuned)", "Random"]
        found = compare(methods, task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
        assert (found.rows, found.protocol["options"]) == ([], {"Random": {}})

    def test_options_are_chosen_once_for_averages_and_once_for_one_model(self, task, tmp_path):
        measures = {"lds": {}, "retrainings": {"methods": ["DiagonalEKFAC"], "budgets": [0, 1, 2]}}
        rows = compare(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW).retrainings
        assert rows[0].options["residuals"] == "both"
        assert rows[0].normalize is None
        assert rows[0].name == "DiagonalEKFAC" + OUT_OF_SAMPLE
        averaged = {(*row.options.items(), row.normalize) for row in rows[2:]}
        assert len(averaged) == 1
        assert rows[1].options["residuals"] == "temperature"

    def test_one_fit_serves_all_dampings_normalizations_and_answers(self, task, tmp_path, monkeypatch):
        fitted = []
        fit = DiagonalEKFAC.fit_checkpoint

        def counted(method, *args):
            fitted.append(method.damping)
            return fit(method, *args)

        monkeypatch.setattr(DiagonalEKFAC, "fit_checkpoint", counted)
        measures = {"retrainings": {"methods": ["DiagonalEKFAC"], "budgets": [0, 1, 2]}}
        rows = compare(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW).retrainings
        assert len(contender("DiagonalEKFAC", settle(["Random"], task, store=tmp_path, **FEW)).grid) == 3
        assert [row.n_models for row in rows] == [1, 4, 2, 6, 4, 8]
        assert len(fitted) == 1 + 4 + 4  # those that stand beside models of parts are fitted already

    def test_checkpoints_beside_parts_keep_their_options_and_are_weighed_against_them(self, task, tmp_path):
        measures = {"retrainings": {"methods": ["two kinds"], "budgets": [0, 1]}}
        plan = settle(["Random"], task, store=tmp_path, **FEW).halves
        membership = plan.membership.toarray() - 0.5
        margins = _margins(plan, task)
        right = torch.from_numpy((margins - margins.mean(0)).T @ membership).float()
        points = task.test.tensors[0][: len(right)].flatten(1)

        class TwoKinds(Random):
            """Checkpoints know of the second half of the columns, with one damping; parts of the first.

            Scores of parts are so large that those of checkpoints beside them count only if they are divided.
            """

            def __init__(self, model, data, damping, checkpoints=None):
                super().__init__(model, data, checkpoints=checkpoints)
                self.damping, self.of_parts = damping, isinstance((checkpoints or [0])[0], Checkpoint)

            def prepare_query(self, state, model, batch, query):
                return (batch.content[0].flatten(1)[:, None] == points).all(2).nonzero()[:, 1]

            def score_columns(self, state, prepared, columns):
                scores = torch.zeros(len(prepared), task.n_train)
                own = slice(0, task.n_train // 2) if self.of_parts else slice(task.n_train // 2, None)
                if self.damping == (2.0 if self.of_parts else 1.0):
                    scores[:, own] = right[prepared, own] * (1e6 if self.of_parts else 1)
                return scores[:, columns]

        grid = [{"damping": 1.0}, {"damping": 2.0}]
        spec = MethodSpec("two kinds", adapter(TwoKinds), grid, cache_key="two kinds")
        question = settle([spec], task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
        rows = Retrainings().run(Shared(question))
        assert [(row.options["damping"], row.normalize) for row in rows] == [
            (1.0, None), (1.0, None), (2.0, None), (2.0, "deviation"),
        ]  # fmt: skip
        assert [row.checkpoint_options for row in rows] == [None, None, None, {"damping": 1.0}]
        parts, together = rows[2:]
        own = right[10:].clone()
        own[:, task.n_train // 2 :] = 0
        beside = right[10:] - own
        unit = sum(scores / scores.std(1, correction=0, keepdim=True) for scores in (own, beside))
        wanted = lds(unit, plan.membership, margins[:, 10:], n_resamples=0).value
        assert together.lds.value == pytest.approx(wanted, rel=1e-6)
        assert wanted > parts.lds.value

    def test_a_method_that_takes_long_stops_at_its_budget(self, task, tmp_path):
        measures = {"retrainings": {"methods": ["TracIn"], "budgets": [1, 2], "up_to": {"TracIn": 1}}}
        rows = compare(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW).retrainings
        assert [row.trainings for row in rows] == [1.0]

    @pytest.mark.parametrize("options", [{"STRIDE": GIVEN}, {"STRIDE (tuned)": GIVEN}])
    def test_options_that_are_given_are_not_chosen(self, task, tmp_path, options):
        question = settle(
            ["STRIDE"], task, store=tmp_path, retrainings=[0], n_resamples=0, options=options, **FEW
        )
        rows = Retrainings().run(Shared(question))
        assert [(row.name, row.options) for row in rows] == [("STRIDE", GIVEN)] * 2

    @pytest.mark.parametrize(
        "spec",
        [
            MethodSpec("TRAK", adapter(Random)),
            MethodSpec("TRAK" + OUT_OF_SAMPLE, adapter(Random)),
            MethodSpec("STRIDE", METHODS["STRIDE"].build, [{"damping": 7.0}]),
        ],
        ids=["a known name", "a known name of ours", "a grid"],
    )
    def test_a_spec_of_the_user_is_measured_as_it_is(self, task, tmp_path, spec):
        question = settle([spec], task, store=tmp_path, retrainings=[1], n_resamples=0, **FEW)
        (row,) = Retrainings().run(Shared(question))
        assert (row.name, row.options) == (spec.name, spec.grid[0])
        assert contender(spec.name, question).build is spec.build

    def test_tables_count_trainings(self, task, tmp_path):
        names = ["STRIDE", "STRIDE, cross-fitted"]
        rows = compare(names, task, store=tmp_path, measures=["lds"], n_resamples=0, **FEW).rows
        assert [row.to_dict()["trainings"] for row in rows] == [0.0, 1.0]


def _operators(row):
    from stride_captum import ClosedForm

    return ClosedForm(**row.options)


def _margins(plan: RetrainingPlan, task):
    from stride_captum.evaluation.measures.linear_datamodeling import margins

    logits = plan.execute(1, False)
    return margins(logits, task.test.tensors[1][: plan.n_test].numpy())[0]


@pytest.mark.slow
class TestReport:
    def test_results_conform_and_the_page_has_the_picture(self, found, tmp_path):
        results = json.loads(json.dumps(found[1].to_dict(), allow_nan=False))
        jsonschema.validate(results, SCHEMA)
        page = write_comparison(results, tmp_path / "report.html").read_text("utf-8")
        assert "How much retraining is worth it?" in page
        assert "cost in trainings on everything" in page
        lines = re.findall(r"<(?:text|tspan)[^>]*>([^<]+)</", page)
        assert [lines[i - 1] for i, line in enumerate(lines) if line == "refined"] == ["STRIDE,"]
        assert "with checkpoints" in lines
        for i, row in enumerate(results["retrainings"]):
            for key in ("trainings", "n_models"):
                assert f'data-path="/retrainings/{i}/{key}" data-value="{row[key]}"' in page
        del results["retrainings"]
        jsonschema.validate(results, SCHEMA)
        without = write_comparison(results, tmp_path / "report.html").read_text("utf-8")
        assert "How much retraining" not in without

    def test_steps_go_from_the_cheapest_to_the_dearest(self, found):
        rows = [row.to_dict() for row in found[1].retrainings]
        assert budget_steps(rows[::-1]) == [
            ("last checkpoint", 0.0),
            ("checkpoints", 0.0),
            ("cross-fitted", 1.0),
            ("cross-fitted", 2.0),
        ]

    def test_a_frame_has_a_row_for_each_budget(self, found):
        frame = found[1].frame("retrainings")
        assert frame["trainings"].tolist() == [0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 1, 2, 2]


@pytest.mark.slow
def test_the_summary_of_budgets_alone_names_the_highest(task, tmp_path):
    measures = {"retrainings": {"methods": ["Random", "STRIDE"], "budgets": [0]}}
    found = compare(["STRIDE"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
    best = max(found.retrainings, key=lambda row: row.lds.value)
    (sentence,) = found.summary()
    assert sentence.startswith("LDS was measured against the retraining budget alone: it is highest, ")
    assert f"{best.lds.value:.3f}, for {best.name} with " in sentence


class TestReach:
    def test_partitions_that_no_method_reaches_are_not_trained(self, task, tmp_path, trained):
        measures = {"retrainings": {"methods": ["TracIn"], "budgets": [1, 6], "up_to": {"TracIn": 1}}}
        question = settle(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
        assert question.partitions == {HALVES: 1}
        measures["retrainings"]["methods"] = ["TracIn", "STRIDE"]
        question = settle(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
        assert question.partitions == {HALVES: 6}

    @pytest.mark.slow
    def test_budgets_that_are_left_out_are_told(self, task, tmp_path):
        measures = {
            "retrainings": {"methods": ["TracIn"], "budgets": [0.5, 1], "epochs": 2, "up_to": {"TracIn": 0.5}}
        }
        question = settle(["Random"], task, store=tmp_path, measures=measures, n_resamples=0, **FEW)
        shared = Shared(question)
        assert [row.trainings for row in Retrainings().run(shared)] == [0.5]
        why = "is beyond its highest budget, 0.5 (`up_to`)"
        assert shared.skipped["TracIn, out-of-sample residuals at 1"] == why


class TestOtherLosses:
    """A loss without classes, and without a temperature."""

    @pytest.fixture
    def values(self):
        def network():
            return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))

        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(40, 5, generator=generator), torch.randn(40, 2, generator=generator)
        training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
        return Task("values", TensorDataset(x, y), TensorDataset(x + 0.1, y), network, training, loss="mse")

    def test_averages_have_residuals_that_the_loss_has(self, values, tmp_path):
        question = settle(["TRAK"], values, store=tmp_path, retrainings=[0, 2], n_resamples=0, **FEW)
        spec = contender("TRAK", question)
        assert {point["residuals"] for point in grid_for(spec, question, averages=True)} == {"both"}

    @pytest.mark.slow
    def test_rows_are_measured_and_refined(self, values, tmp_path):
        question = settle(
            ["STRIDE", "TracIn"], values, store=tmp_path, retrainings=[0, 2], n_resamples=0, **FEW
        )
        rows = Retrainings().run(Shared(question))
        assert [row.source for row in rows if row.name == "STRIDE"] == [
            "last checkpoint", "checkpoints", "cross-fitted", "checkpoints and parts", "refined",
        ]  # fmt: skip
        models, model = cross_fit(values, 0, 2, tmp_path), train_attributed(values, 0, tmp_path)
        x, y = (t[10:20] for t in values.test.tensors)
        measured = models.measured(model, (x, y), loss=values.loss)
        model.load_state_dict(models.checkpoints[3].weights)
        with torch.no_grad():
            wanted = responses(values.loss, model(x), y)
        np.testing.assert_allclose(measured[:, 3], wanted, rtol=1e-5)

    def test_options_that_the_loss_does_not_take_are_refused_before_training(self, values, tmp_path, trained):
        options = {"TRAK": {"residuals": "temperature"}}
        with pytest.raises(ValueError, match="which has no temperature"):
            settle(["TRAK"], values, store=tmp_path, retrainings=[1], options=options, **FEW)
        assert not trained


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"budgets": []}, r"must be a sequence of numbers; got \[\]"),
            ({"budgets": [1, -1]}, "must hold numbers of at least 0; got -1"),
            ({"budgets": ["1"]}, "must hold numbers of at least 0; got '1'"),
            ({"budgets": [1.5]}, "must be multiples of 1, the cost of one partition; got 1.5"),
            ({"budgets": [0.5], "epochs": 3}, "must be multiples of 0.75, the cost of one partition"),
            ({"parts": 1}, "must be an integer of at least 2; got 1"),
            ({"parts": 10_000}, "must be at most n_train = 300; got 10000"),
            ({"epochs": 0}, "must be an integer of at least 1; got 0"),
            ({"methods": []}, "must name at least one method; got none"),
            ({"methods": ["STRIED"]}, "Nearest: 'STRIDE'"),
        ],
    )
    def test_of_what_cannot_be_measured(self, task, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            settle(["STRIDE"], task, store=tmp_path, measures={"retrainings": settings}, **FEW)

    def test_of_a_method_that_takes_no_checkpoints(self, task, tmp_path):
        spec = MethodSpec("Stubborn", lambda model, data, options: Random(model, data, odd=options))
        with pytest.raises(ValueError, match="methods whose `build` takes the option `checkpoints`; got"):
            settle([spec], task, store=tmp_path, measures={"retrainings": {"methods": ["Stubborn"]}}, **FEW)

    def test_named_methods_are_those_of_the_ladder(self, task, tmp_path):
        names = ["TracIn", "STRIDE, cross-fitted", "TracIn, out-of-sample residuals"]
        question = settle(names, task, store=tmp_path, retrainings=[1], **FEW)
        assert question.measures["retrainings"]["methods"] == ["TracIn"]
        assert question.partitions == {HALVES: 1}
        assert not question.along

    def test_the_epochs_of_the_task_are_no_other_split(self, task, tmp_path):
        measures = {"retrainings": {"budgets": [1], "epochs": EPOCHS, "methods": ["STRIDE"]}}
        assert settle(["STRIDE"], task, store=tmp_path, measures=measures, **FEW).partitions == {HALVES: 1}
        measures["retrainings"]["epochs"] = 2
        found = settle(["STRIDE"], task, store=tmp_path, measures=measures, **FEW).partitions
        assert found == {Split(2, 2): 2}


def test_trainings_of_other_lengths_have_other_names(task):
    versions = {TaskTraining(task, **o).version for o in ({}, {"epochs": 2}, {"along": True})}
    assert len(versions) == 3


def test_measured_responses_of_a_binary_network_with_one_logit(tmp_path):
    model = torch.nn.Linear(3, 1)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 1, 0, 1])
    found = cross_fitting.retrain(lambda rows, seed: model, 10)
    with torch.no_grad():
        wanted = model(x)[:, 0].double().numpy() * np.array([-1, 1, 1, -1, 1])
    np.testing.assert_allclose(found.measured(model, (x, y))[:, 0], wanted, rtol=1e-5)
