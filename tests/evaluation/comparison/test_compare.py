"""The protocol of a comparison: who is tuned on what, what is refused first, what is said afterwards."""

import itertools
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import Random, Similarity, TracIn
from stride_captum.evaluation import MethodSpec, compare
from stride_captum.evaluation.comparison.compare import answer, comparison_sizes, planned_trainings
from stride_captum.evaluation.comparison.plan import MEASURES, settle, wanted_measures
from stride_captum.evaluation.comparison.runs import counterfactual as counterfactual_runs
from stride_captum.evaluation.comparison.runs.leakage import plant
from stride_captum.evaluation.comparison.runs.mislabel import flipped_task
from stride_captum.evaluation.comparison.shared.detectors import DETECTORS
from stride_captum.evaluation.comparison.shared.measure import Measure
from stride_captum.evaluation.comparison.shared.methods import DEFAULT_METHODS, METHODS, adapter
from stride_captum.evaluation.comparison.shared.question import halves
from stride_captum.evaluation.measures.counterfactual_drop import resolve_counts
from stride_captum.evaluation.report.html import write_comparison
from stride_captum.evaluation.report.terminal import console, show_comparison
from stride_captum.evaluation.retraining import attributed_models, spikes, workers
from stride_captum.evaluation.retraining.attributed_models import (
    even_epochs,
    log_epochs,
    train_attributed,
    train_checkpoints,
    train_spiked,
)
from stride_captum.evaluation.retraining.plan import RetrainingPlan
from stride_captum.evaluation.retraining.task_parts import Split, cross_fit
from stride_captum.evaluation.tasks.checks import check_task
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task

N_TRAIN, N_TEST = 90, 60
FEW = {"n_subsets": 12, "n_seeds": 1, "n_models": 1, "n_test": 40, "n_jobs": 1, "n_resamples": 20}


def settled(methods, task, measures, options=None):
    return settle(methods, task, measures=measures, options=options, store="unused", n_test=40)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Unlucky(nn.Module):
    """Diverges in the retrainings with some seeds."""

    seeds = ()

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x) + (torch.nan if torch.initial_seed() in Unlucky.seeds else 0.0)


@pytest.fixture
def task():
    y = torch.arange(N_TRAIN + N_TEST) % 3
    x = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(0)) + torch.eye(6)[y]
    settings = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=4, batch_size=16)
    return Task(
        "clusters",
        TensorDataset(x[:N_TRAIN], y[:N_TRAIN]),
        TensorDataset(x[N_TRAIN:], y[N_TRAIN:]),
        network,
        settings,
    )


class Silent(Random):
    """Says nothing."""

    def influence(self, *args, **kwargs):
        return 0 * super().influence(*args, **kwargs)


silent = MethodSpec("silent", adapter(Silent))


# Who is tuned on what.


class Planted(Random):
    """Knows the effects of the test points of one half and says the opposite for the other half.

    The places of test points are their first inputs.
    """

    good_on = "tuning"
    effects = None

    def influence(self, inputs, **options):
        places = inputs[0][:, 0].round().long()
        on_tuning = places < 20
        sign = torch.where(on_tuning == (self.good_on == "tuning"), 1.0, -1.0)
        return sign[:, None] * Planted.effects[places]


@pytest.fixture
def planted(task, monkeypatch):
    """Retrainings whose margins are sums of effects; the first input of a test point is its place."""
    x, y = (t.clone() for t in task.test.tensors)
    x[:, 0] = torch.arange(N_TEST)
    effects = torch.randn(N_TEST, N_TRAIN, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Planted, "effects", effects)

    def execute(plan, *args, **kwargs):
        sums = torch.from_numpy(plan.membership @ effects[: plan.n_test].numpy().T.astype(float))
        logits = torch.zeros(*sums.shape, 3, dtype=torch.float64)
        logits.scatter_(2, y[: plan.n_test].expand(len(sums), -1)[..., None], sums[..., None])
        return logits[None].numpy()

    monkeypatch.setattr(RetrainingPlan, "execute", execute)
    return replace(task, test=TensorDataset(x, y))


def planted_row(model, data, options):
    method = Planted(model, data)
    method.good_on = options["good_on"]
    return method


class TestHalves:
    @pytest.mark.slow
    @pytest.mark.parametrize("order", [("tuning", "reported"), ("reported", "tuning")])
    def test_one_half_chooses_and_the_other_is_reported(self, planted, tmp_path, order):
        row = MethodSpec("planted", planted_row, [{"good_on": half} for half in order])
        (found,) = compare([row], planted, store=tmp_path, measures=["lds"], **FEW).rows
        assert found.options == {"good_on": "tuning"}
        assert found.lds.value == pytest.approx(-1.0)
        assert found.lds.per_test.shape == (1, 20)

    @pytest.mark.slow
    def test_options_that_are_given_are_not_chosen(self, planted, tmp_path):
        row = MethodSpec("planted", planted_row, [{"good_on": half} for half in ("tuning", "reported")])
        given = {"planted": {"good_on": "reported"}}
        (found,) = compare([row], planted, store=tmp_path, measures=["lds"], options=given, **FEW).rows
        assert found.options == {"good_on": "reported"}
        assert found.lds.value == pytest.approx(1.0)

    @pytest.mark.slow
    def test_a_point_that_ranks_nothing_is_never_the_best(self, planted, tmp_path):
        def build(model, data, options):
            return (Silent if options["silent"] else Planted)(model, data)

        for order in ((True, False), (False, True)):
            row = MethodSpec("row", build, [{"silent": flag} for flag in order])
            (found,) = compare([row], planted, store=tmp_path, measures=["lds"], **FEW).rows
            assert found.options == {"silent": False}

    @pytest.mark.slow
    def test_a_point_that_answers_few_test_points_is_not_the_best_by_its_silence(self, planted, tmp_path):
        class Few(Planted):
            few = True

            def influence(self, inputs, **options):
                scores = Planted.effects[inputs[0][:, 0].round().long()]
                noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
                return torch.where(
                    torch.arange(len(scores))[:, None] < 2, scores, 0 if self.few else scores + noise
                )

        def build(model, data, options):
            method = Few(model, data)
            method.few = options["few"]
            return method

        row = MethodSpec("row", build, [{"few": flag} for flag in (True, False)])
        (found,) = compare([row], planted, store=tmp_path, measures=["lds"], **FEW).rows
        assert found.options == {"few": False}

    @pytest.mark.parametrize("n_train", [90, 89])
    def test_subsets_hold_half_of_the_training_set(self, task, tmp_path, n_train):
        x, y = (t[:n_train] for t in task.train.tensors)
        plan = halves(replace(task, train=TensorDataset(x, y)), tmp_path, 30, 2, 40)
        assert plan.membership.shape == (30, n_train)
        assert set(np.diff(plan.membership.indptr)) == {n_train // 2}
        assert (plan.n_seeds, plan.n_test, plan.common_seeds) == (2, 40, False)

    @pytest.mark.slow
    def test_the_protocol_says_so(self, planted, tmp_path):
        found = compare([silent], planted, store=tmp_path, measures=["lds"], **FEW).protocol
        assert found["subset_size"] == 45
        assert (found["n_test_tuning"], found["n_test_reported"]) == (20, 20)
        assert (found["n_subsets"], found["left_out"]) == (12, [])


class TestCounterfactualPoints:
    @pytest.fixture
    def asked(self, monkeypatch):
        seen = []

        def measure(task, methods, models, **options):
            seen.append({"methods": list(methods), **options})
            return []

        monkeypatch.setattr(counterfactual_runs, "measure_counterfactual", measure)
        return seen

    @pytest.mark.slow
    @pytest.mark.parametrize("measures", [{}, {"lds": {}}])
    def test_are_reported_ones(self, planted, tmp_path, asked, measures):
        settings = {"counts": (5,), "arms": ("proponents", "opponents")}
        compare(
            ["Similarity"], planted, store=tmp_path, measures={**measures, "counterfactual": settings}, **FEW
        )
        assert [list(call["test_points"]) for call in asked] == [list(range(20, 30))] * 2
        assert [call["opponents"] for call in asked] == [False, True]

    @pytest.mark.slow
    def test_are_as_many_as_are_asked_for(self, planted, tmp_path, asked):
        measures = {"lds": {}, "counterfactual": {"counts": (5,), "n_points": 3}}
        compare(["Similarity"], planted, store=tmp_path, measures=measures, **FEW)
        assert list(asked[0]["test_points"]) == [20, 21, 22]

    def test_that_choose_options_are_refused(self, planted, tmp_path):
        measures = {"lds": {}, "counterfactual": {"counts": (5,), "test_points": [19, 20]}}
        with pytest.raises(
            ValueError,
            match=r"`measures\['counterfactual'\]\['test_points'\]` must be distinct places in \[20, 60\); "
            r"got \[19, 20\]\. Options are chosen on the test points before these\.",
        ):
            compare(["Similarity"], planted, store=tmp_path, measures=measures, **FEW)

    def test_may_be_any_where_nothing_chooses(self, planted, tmp_path, asked):
        measures = {"counterfactual": {"counts": (5,), "test_points": [0, 59]}}
        compare(["Similarity"], planted, store=tmp_path, measures=measures, **FEW)
        assert list(asked[0]["test_points"]) == [0, 59]

    def test_controls_stand_beside_the_methods_that_are_named(self, planted, tmp_path, asked):
        measures = {"counterfactual": {"counts": (5,), "methods": "STRIDE"}}
        compare(
            ["STRIDE", "Random", "Similarity", "ClassRandom"],
            planted,
            store=tmp_path,
            measures=measures,
            **FEW,
        )
        assert asked[0]["methods"] == ["STRIDE", "Similarity", "ClassRandom"]


class TestOptionsOfAnotherComparison:
    """Options that are given may have been chosen on test points that are reported here."""

    WHERE = "The options that were given were chosen on the first 30 test points"

    @pytest.mark.parametrize(
        ("measures", "n_test", "start"),
        [
            (["lds"], 40, 20),
            ({"counterfactual": {"counts": (5,), "test_points": [7, 50]}}, 60, 7),
            ({"counterfactual": {"counts": (5,)}}, 40, 20),
        ],
    )
    def test_are_told_in_the_report(self, task, tmp_path, measures, n_test, start):
        few = {**FEW, "n_test": n_test}
        with pytest.warns(UserWarning, match=f"{self.WHERE}, and test points from {start} on are reported"):
            question = settle(["Similarity"], task, store=tmp_path, measures=measures, chosen_on=30, **few)
        assert self.WHERE in question.note
        assert "at least 60 test points" in question.note

    def test_are_no_reason_to_warn_on_other_points(self, task, tmp_path):
        few = {**FEW, "n_test": 60}
        measures = {"lds": {}, "leakage": {"counts": (5,)}}
        assert settle(["Similarity"], task, store=tmp_path, measures=measures, chosen_on=30, **few).note == ""
        alone = settle(["Similarity"], task, store=tmp_path, measures=["mislabel"], chosen_on=50, **FEW)
        assert alone.note == ""

    @pytest.mark.slow
    def test_and_are_in_the_protocol(self, task, tmp_path):
        with pytest.warns(UserWarning, match=self.WHERE):
            question = settle(["Similarity"], task, store=tmp_path, measures=["lds"], chosen_on=30, **FEW)
        found = answer(question).to_dict()
        assert found["protocol"]["options_chosen_on"] == 30
        assert self.WHERE in found["note"]


class TestCheckpoints:
    @pytest.mark.slow
    def test_are_those_of_the_training_and_the_attributed_model_last(self, task, tmp_path):
        seen = []

        class Watched(TracIn):
            def __init__(self, model, data, **options):
                super().__init__(model, data, **options)
                if len(list(tmp_path.glob("*.npy"))):  # not the check before anything is trained
                    seen.append((model, list(self.checkpoints)))

        row = MethodSpec("4 checkpoints", adapter(Watched), n_checkpoints=4)
        compare([row], task, store=tmp_path, measures=["lds"], **{**FEW, "n_models": 2})
        assert len(seen) == 2
        for seed, (model, states) in enumerate(seen):
            attributed = train_attributed(task, seed, tmp_path).state_dict()
            earlier = train_checkpoints(task, seed, tmp_path, even_epochs(task.training.epochs, 3))
            assert len(states) == 4
            for state, expected in zip(states, [*earlier, attributed], strict=True):
                assert all(torch.equal(state[name], value) for name, value in expected.items())
            assert all(torch.equal(v, attributed[name]) for name, v in model.state_dict().items())

    def test_need_as_many_epochs(self, task, tmp_path):
        short = replace(task, training=replace(task.training, epochs=3))
        with pytest.raises(
            ValueError,
            match=r"`epochs` must be at least 4 for 'TracIn, 4 checkpoints'; got 3\. Its checkpoints",
        ):
            compare(["TracIn, 4 checkpoints"], short, store=tmp_path, **FEW)
        assert settled(None, short, ["lds"]).skipped["TracIn, 4 checkpoints"] == "needs at least 4 epochs"

    @pytest.mark.slow
    def test_every_measure_gives_them_those_of_its_own_trainings(self, task, tmp_path):
        seen = []

        class Watched(Similarity):
            def fit(self, *args, **kwargs):
                seen.append([self.model, *self.checkpoints])
                return super().fit(*args, **kwargs)

        rows = [
            MethodSpec("along", adapter(Watched), n_checkpoints="log"),
            MethodSpec("halves", adapter(Watched), partitions=1),
        ]
        measures = {"mislabel": {"detectors": (), "n_held_out": 4}, "leakage": {"counts": (3,)}}
        compare(rows, task, store=tmp_path, measures=measures, **FEW)
        noisy, _ = flipped_task(task)
        planted = plant(task, 3).task
        own = [noisy, noisy, planted, planted]
        assert len(seen) == len(own)
        for (model, *given), trained_on, of_halves in zip(seen, own, [False, True] * 2, strict=True):
            last = train_attributed(trained_on, 0, tmp_path).state_dict()
            assert all(torch.equal(v, last[name]) for name, v in model.state_dict().items())
            if of_halves:
                wanted = [c.weights for c in cross_fit(trained_on, 0, 1, tmp_path).checkpoints]
                assert sorted(i for c in given for i in c.seen) == list(range(trained_on.n_train))
                given = [c.weights for c in given]
            else:
                epochs = log_epochs(task.training.epochs)
                wanted = [*train_checkpoints(trained_on, 0, tmp_path, epochs), last]
            for state, expected in zip(given, wanted, strict=True):
                assert all(torch.equal(state[name], value) for name, value in expected.items())

    def test_a_measure_that_leaves_a_row_out_trains_nothing_for_it(self, task, tmp_path):
        rows = ["STRIDE", "STRIDE, checkpoints", "STRIDE, cross-fitted"]
        measures = {"counterfactual": {"methods": ["STRIDE"], "counts": (3,), "n_points": 1, "n_seeds": 1}}
        question = settle(rows, task, store=tmp_path, measures=measures, **FEW)
        assert [e.purpose for e in planned_trainings(question)] == [
            "attributed models",
            "counterfactual drop, proponents",
        ]

    def test_are_not_an_option(self, task, tmp_path):
        options = {"STRIDE": {"checkpoints": ["weights.pt"]}}
        with pytest.raises(
            ValueError, match=r"`options\['STRIDE'\]` must leave `checkpoints` to the comparison"
        ):
            compare(["STRIDE"], task, store=tmp_path, options=options, **FEW)

    @pytest.mark.parametrize("name", ["STRIDE, checkpoints and halves", "TRAK, cross-fitted"])
    def test_budgets_are_measured_for_methods_that_use_a_model_alone(self, task, tmp_path, name):
        measures = {"retrainings": {"methods": (name,)}}
        with pytest.raises(ValueError, match="methods"):
            settle(["STRIDE", name], task, store=tmp_path, measures=measures, **FEW)

    @pytest.mark.slow
    def test_of_the_counterfactual_drop_are_those_of_the_attributed_models(self, task, tmp_path):
        seen = {}

        class Watched(Similarity):
            def fit(self, *args, **kwargs):
                seen[len(self.checkpoints)] = list(self.checkpoints)
                return super().fit(*args, **kwargs)

        rows = [
            MethodSpec("along", adapter(Watched), n_checkpoints=4),
            MethodSpec("halves", adapter(Watched), partitions=1),
        ]
        measures = {"counterfactual": {"counts": (3,), "n_points": 1, "n_seeds": 1, "reference": "halves"}}
        found = compare(rows, task, store=tmp_path, measures=measures, **FEW)
        assert [row.name for row in found.counterfactual] == ["along", "halves"]
        parts = cross_fit(task, 0, 1, tmp_path).checkpoints
        for given, wanted in zip(seen[2], parts, strict=True):
            assert all(torch.equal(given.weights[name], v) for name, v in wanted.weights.items())
        assert len(seen[4]) == 4


# What a method takes where nothing chooses.


class TestDefaults:
    def test_are_the_method_s_own_without_lds(self, task):
        asked = settled(["TRAK", "KNNShapley", "STRIDE (tuned)", "Similarity"], task, ["mislabel"])
        assert [c.grid for c in asked.specs] == [[{}]] * 4
        tuned = settled(["TRAK"], task, ["mislabel", "calibration"])
        assert tuned.specs[0].grid == list(METHODS["TRAK"].grid)

    def test_are_those_of_the_row_where_it_has_some(self, task):
        one = MethodSpec("one", adapter(Random), [{"seed": 3}])
        many = MethodSpec("many", adapter(Random), [{"seed": 1}, {"seed": 2}], default={"seed": 5})
        asked = settled([one, many], task, {"leakage": {"counts": (3,)}})
        assert [c.grid for c in asked.specs] == [[{"seed": 3}], [{"seed": 5}]]

    @pytest.mark.parametrize(
        ("given", "own", "counts"),
        [({}, {}, (3, 1)), ({"n_models": 3}, {}, (3, 3)), ({"n_models": 3}, {"n_models": 2}, (3, 2))],
    )
    def test_a_number_of_models_is_also_that_of_measures_that_train_their_own(self, task, given, own, counts):
        measures = {"mislabel": own, "leakage": {"counts": (3,), **own}, "lds": {}}
        asked = settle(["STRIDE"], task, store="unused", measures=measures, n_test=40, **given)
        assert asked.n_models == counts[0]
        assert {MEASURES[name].settings(asked)["n_models"] for name in ("mislabel", "leakage")} == {counts[1]}
        assert asked.measures["lds"] == {}

    def test_parts_reach_budgets_that_the_measures_name(self, task):
        measures = {"retrainings": {"budgets": [1], "methods": ["STRIDE"]}}
        asked = settle(["STRIDE"], task, store="unused", measures=measures, parts=3, n_test=40)
        assert asked.partitions == {Split(3): 1}

    def test_give_way_to_given_options(self, task):
        given = {"TRAK": {"damping": np.float32(0.5)}, "EKFAC": {"damping": 0.1}}
        (row,) = settled(["TRAK"], task, ["lds"], given).specs
        assert row.grid == [{"damping": 0.5}]
        assert type(row.grid[0]["damping"]) is float

    def test_methods_that_are_not_there_are_skipped_by_default_and_refused_by_name(self, task, monkeypatch):
        monkeypatch.setattr(MethodSpec, "available", property(lambda c: c.needs is None))
        asked = settled(None, task, ["lds"])
        assert asked.skipped == dict.fromkeys(
            ("EKFAC", "EKFAC, out-of-sample residuals"), "needs kronfluence"
        )
        assert "EKFAC" not in [c.name for c in asked.specs]
        assert [c.name for c in settled(["EKFAC"], task, ["lds"]).specs] == ["EKFAC"]


@pytest.mark.slow
def test_numbers_of_numpy_are_numbers(task, tmp_path):
    found = compare(
        ["TRAK", "KNNShapley", "STRIDE"],
        task,
        store=tmp_path,
        measures={"mislabel": {"rate": np.float32(0.25), "n_held_out": np.int64(20), "detectors": ()}},
        options={
            "TRAK": {"damping": np.float32(0.5)},
            "KNNShapley": {"k": np.arange(5, 6)[0]},
            "STRIDE": {"damping": np.float64(0.5)},
        },
        **FEW,
    ).to_dict()
    written = json.loads(json.dumps(found, allow_nan=False))
    assert written["protocol"]["measures"] == {
        "mislabel": {"rate": 0.25, "n_held_out": 20, "detectors": [], "n_models": 1}
    }
    assert written["protocol"]["options"] == {
        "TRAK": {"damping": 0.5}, "KNNShapley": {"k": 5}, "STRIDE": {"damping": 0.5}
    }  # fmt: skip
    write_comparison(written, tmp_path / "report.html")


# What is refused, before anything is trained.

REFUSED = {
    "one method": (
        {"methods": "STRIDE"},
        TypeError,
        r"`methods` must be a sequence of names and",
    ),
    "no method": ({"methods": []}, ValueError, r"`methods` must name at least one method; got none"),
    "another method": ({"methods": ["Stride"]}, ValueError, r"`methods` must be one of .*; got 'Stride'"),
    "one name twice": (
        {"methods": ["STRIDE", MethodSpec("STRIDE", adapter(Random))]},
        ValueError,
        r"`methods` must have names of their own; got 'STRIDE' twice\. Give each a `name`\.",
    ),
    "one measure": ({"measures": "lds"}, TypeError, r"`measures` must be a sequence of names, or a mapping"),
    "another measure": ({"measures": ["ldss"]}, ValueError, r"`measures` must be one of .*; got 'ldss'"),
    "options of LDS": (
        {"measures": {"lds": {"n_seeds": 3}}},
        ValueError,
        r"`measures\['lds'\]` must have no options; got 'n_seeds'",
    ),
    "options of another row": (
        {"options": {"TRACK": {}}},
        ValueError,
        r"`options` must be one of .*; got 'TRACK'\. Nearest: 'TRAK'",
    ),
    "options that a row does not take": (
        {"options": {"Similarity": {"dampin": 1.0}}},
        ValueError,
        r"`options` must be such that 'Similarity' can be built; got \{'dampin': 1\.0\} \(TypeError",
    ),
    "options out of range": (
        {"methods": ["TRAK"], "options": {"TRAK": {"damping": -1.0}}},
        ValueError,
        r"`damping` must be a number",
    ),
    "a row that needs options": (
        {
            "methods": [MethodSpec("row", planted_row, [{"good_on": "a"}, {"good_on": "b"}])],
            "measures": {"mislabel": {}},
        },
        ValueError,
        r"`options` must be such that 'row' can be built; got \{\} \(KeyError: 'good_on'\)\. .* `default`",
    ),
    "few subsets": ({"n_subsets": 2}, ValueError, r"`n_subsets` must be an integer of at least 3; got 2"),
    "few subsets for C.1": (
        {"measures": ["linearized"], "n_subsets": 5},
        ValueError,
        r"`n_subsets` .* at least 6; got 5",
    ),
    "no seeds": ({"n_seeds": 0}, ValueError, r"`n_seeds` must be at least 1; got 0"),
    "no models": ({"n_models": 0}, ValueError, r"`n_models` must be an integer of at least 1; got 0"),
    "one test point": ({"n_test": 1}, ValueError, r"`n_test` must be at least 2: one half tunes"),
    "another engine": ({"engine": "stack"}, ValueError, r"`engine` must be one of .*; got 'stack'"),
    "no resamples": ({"n_resamples": -1}, ValueError, r"`n_resamples` must be .* at least 0; got -1"),
    "counts": (
        {"measures": ["lds", "counterfactual"]},
        ValueError,
        r"`counts` must be integers in \[1, 90\)",
    ),
    "an arm": (
        {"measures": {"counterfactual": {"counts": (5,), "arms": ("opponent",)}}},
        ValueError,
        r"`measures\['counterfactual'\]\['arms'\]` must be one of 'proponents', 'opponents'; got 'opponent'",
    ),
    "a method of the counterfactual": (
        {"measures": {"counterfactual": {"counts": (5,), "methods": ("Stride",)}}},
        ValueError,
        r"`measures\['counterfactual'\]\['methods'\]` must be one of .*; got 'Stride'",
    ),
    "no method of the counterfactual": (
        {"measures": {"counterfactual": {"counts": (5,), "methods": []}}},
        ValueError,
        r"`measures\['counterfactual'\]\['methods'\]` must name at least one method; got none\. Leave it out",
    ),
    "parts without budgets": (
        {"parts": 3},
        ValueError,
        r"`parts` must be given with `retrainings`; got 3 alone\. Name budgets, with --retrainings",
    ),
    "budgets twice": (
        {"retrainings": [1], "measures": {"retrainings": {"budgets": [2]}}},
        ValueError,
        r"`retrainings` must be given once; got \[1\], and measures\['retrainings'\] with 'budgets' = \[2\]",
    ),
    "parts twice": (
        {"parts": 3, "measures": {"retrainings": {"budgets": [1], "parts": 5}}},
        ValueError,
        r"`parts` must be given once; got 3, and measures\['retrainings'\] with 'parts' = 5",
    ),
    "a method that is not compared": (
        {"methods": ["STRIDE"], "measures": {"counterfactual": {"counts": (5,), "methods": ("TRAK",)}}},
        ValueError,
        r"`measures\['counterfactual'\]\['methods'\]` must be one of 'STRIDE'; got 'TRAK'",
    ),
    "a reference": (
        {"measures": {"counterfactual": {"counts": (5,), "reference": "Random"}}},
        ValueError,
        r"\['reference'\]` must be one of 'Similarity'; got 'Random'",
    ),
    "an engine of the counterfactual": (
        {"measures": {"counterfactual": {"counts": (5,), "engine": "stack"}}},
        ValueError,
        r"`measures\['counterfactual'\]\['engine'\]` must be one of .*; got 'stack'",
    ),
    "an option of the counterfactual": (
        {"measures": {"counterfactual": {"count": (5,)}}},
        ValueError,
        r"`measures\['counterfactual'\]` must be one of .*; got 'count'\. Nearest: 'counts'",
    ),
    "points twice": (
        {"measures": {"counterfactual": {"counts": (5,), "n_points": 2, "test_points": [30]}}},
        ValueError,
        r"`measures\['counterfactual'\]` must have `test_points` or `n_points`; got both",
    ),
    "more points than are reported": (
        {"measures": {"counterfactual": {"counts": (5,), "n_points": 21}}},
        ValueError,
        r"\['n_points'\]` must be at most the 20 reported test points; got 21",
    ),
    "no seeds of the counterfactual": (
        {"measures": {"counterfactual": {"counts": (5,), "n_seeds": 0}}},
        ValueError,
        r"`measures\['counterfactual'\]\['n_seeds'\]` must be an integer of at least 1; got 0",
    ),
    "a rate": ({"measures": {"mislabel": {"rate": 0.001}}}, ValueError, r"`rate` must flip some of the 90"),
    "a kind of flips": ({"measures": {"mislabel": {"kind": "other"}}}, ValueError, r"`kind` must be one of"),
    "a detector": (
        {"measures": {"mislabel": {"detectors": ["lost"]}}},
        ValueError,
        r"`measures\['mislabel'\]\['detectors'\]` must be one of 'loss', .*; got 'lost'",
    ),
    "a row with the name of a detector": (
        {"methods": [MethodSpec("loss", adapter(Random))], "measures": {"mislabel": {}}},
        ValueError,
        r"`methods` must have names that no detector has; got 'loss'",
    ),
    "leaked": (
        {"measures": ["lds", "leakage"]},
        ValueError,
        r"`counts` must be between 1 and the 60 test examples",
    ),
    "a kind of leak": (
        {"measures": {"leakage": {"counts": (5,), "kinds": ("flip",)}}},
        ValueError,
        r"`kind` must be 'exact', 'noise' or 'brightness' for inputs that are not images; got 'flip'",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("what", REFUSED)
    def test_come_before_any_training(self, task, tmp_path, what):
        changes, error, said = REFUSED[what]
        arguments = {"methods": ["Similarity"], "measures": ["lds"], **FEW, **changes}
        with pytest.raises(error, match=said):
            compare(arguments.pop("methods"), task, store=tmp_path, **arguments)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("preset", ["smoke", "small"])
    def test_spare_the_presets(self, preset):
        sizes, measures = comparison_sizes(preset)
        assert wanted_measures({measure: {} for measure in MEASURES} | measures)
        assert sizes["n_subsets"] >= 6
        for name in measures.keys() & {"counterfactual", "leakage"}:
            counts = measures[name]["counts"]
            assert len(resolve_counts(counts, 1000)) == len(counts)

    def test_every_option_of_a_measure_is_known(self):
        assert MEASURES["lds"].defaults == {}
        assert sorted(MEASURES["counterfactual"].defaults) == [
            "arms", "counts", "engine", "methods", "n_jobs", "n_points", "n_seeds", "reference", "seed",
            "test_points",
        ]  # fmt: skip
        leakage, mislabel = MEASURES["leakage"].defaults, MEASURES["mislabel"].defaults
        assert leakage == {"counts": (1, 10, 100), "kinds": ("exact",), "n_jobs": 1, "n_models": 1, "seed": 0}
        assert mislabel == {
            "detectors": tuple(DETECTORS), "kind": "symmetric", "n_held_out": 1000, "n_jobs": 1,
            "n_models": 1, "rate": 0.1, "seed": 0,
        }  # fmt: skip

    def test_every_default_method_can_be_built_before_training(self, task):
        asked = settled(None, task, ["lds"])
        assert {c.name for c in asked.specs} | asked.skipped.keys() == set(DEFAULT_METHODS)


class TestTask:
    def test_labels_need_a_logit_each(self, task):
        for which, said in (
            ("train", r"`build_model` must give 6 logits, as the labels go up to 5; got 3"),
            ("test", r"`task` must have labels in \[0, 3\), the logits .*; got label 5 of test example 7\."),
        ):
            x, y = (t.clone() for t in getattr(task, which).tensors)
            y[7] = 5
            with pytest.raises(ValueError, match=said):
                check_task(replace(task, **{which: TensorDataset(x, y)}))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("which", ["train", "test"])
    def test_inputs_are_finite(self, task, which, value):
        x, y = (t.clone() for t in getattr(task, which).tensors)
        x[5, 2] = value
        with pytest.raises(ValueError, match=rf"`{which}` must hold finite inputs; got .* example 5"):
            check_task(replace(task, **{which: TensorDataset(x, y)}))

    def test_a_network_that_cannot_read_the_inputs_is_refused(self, task):
        wrong = replace(task, build_model=lambda: nn.Linear(5, 3))
        with pytest.raises(ValueError, match=r"`build_model` must read inputs of shape \(2, 6\) in"):
            check_task(wrong)

    def test_a_missing_value_is_said_before_any_retraining(self, task, tmp_path):
        x, y = (t.clone() for t in task.test.tensors)
        x[5, 2] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=r"`test` must hold finite inputs; got .* example 5"):
                compare(["STRIDE"], replace(task, test=TensorDataset(x, y)), store=tmp_path, **FEW)
        assert not list(tmp_path.iterdir())


# What a dry run says, and what is then trained.


CHECKPOINTS = ("STRIDE", "TracIn, 4 checkpoints", "ClassRandom", "Random")
FLIPS = {"n_models": 2, "n_held_out": 10, "detectors": ()}
LEAKS = {"counts": (2, 4), "kinds": ("exact", "noise"), "n_models": 2}
DROPS = {"counts": (2, 5), "n_points": 2, "n_seeds": 2, "arms": ("proponents", "opponents")}


class Accuracy(Measure):
    """A measure that is not ours: the test accuracy of every attributed model."""

    name = "accuracy"

    def trainings(self, shared):
        return shared.model_estimates

    def run(self, shared):
        x, y = shared.question.task.test.tensors
        return [
            Figure({"name": name, "accuracy": float((model(x).argmax(1) == y).float().mean())})
            for name, model in shared.models.items()
        ]


class Figure(dict):
    to_dict = dict.copy


@pytest.fixture
def always_spiked(monkeypatch):
    """Every training ends on a spike."""
    rising = itertools.count(1)
    monkeypatch.setattr(spikes, "mean_residual", lambda *args: float(next(rising)))
    monkeypatch.setattr(spikes, "FACTOR", 0.1)


class TestPlannedTrainings:
    @pytest.fixture
    def trained(self, monkeypatch):
        """How many models each training made."""
        seen = []

        def counted(module, name, how_many):
            train = getattr(module, name)

            def of_counted(*args, **options):
                seen.append(how_many(*args))
                return train(*args, **options)

            monkeypatch.setattr(module, name, of_counted)

        counted(attributed_models, "train_model", lambda *args: 1)
        counted(workers, "train_model", lambda *args: 1)
        counted(workers, "train_stacked", lambda build_model, x, y, subsets, *args: len(subsets))
        return seen

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("measures", "n", "engine"),
        [
            ({"lds": {}}, 12 * 2 + 2 + 2, "processes"),
            ({"lds": {}, "calibration": {}, "linearized": {}}, 12 * 2 + 2 + 2, "stacked"),
            ({"mislabel": FLIPS}, 2 + 2, "auto"),
            ({"leakage": LEAKS}, 2 * 2 * 2 + 8, "auto"),
            ({"lds": {}, "mislabel": FLIPS, "leakage": LEAKS}, 28 + 4 + 16, "auto"),
        ],
    )
    def test_are_those_that_are_done(self, task, tmp_path, trained, measures, n, engine):
        few = {**FEW, "n_seeds": 2, "n_models": 2, "engine": engine}
        question = settle(CHECKPOINTS, task, store=tmp_path, measures=measures, **few)
        planned = planned_trainings(question)
        assert not list(tmp_path.iterdir())
        assert not any(estimate.at_most for estimate in planned)
        trained.clear()  # of the epochs that were timed
        answer(question)
        assert sum(estimate.n_missing for estimate in planned) == sum(trained) == n
        trained.clear()
        again = planned_trainings(question)
        assert [e.n_runs for e in again] == [e.n_runs for e in planned]
        assert sum(e.n_missing for e in again) == len(trained) == sum(e.seconds for e in again) == 0

    @pytest.mark.slow
    def test_of_counterfactuals_are_at_most_those(self, task, tmp_path, trained, always_spiked):
        few = {**FEW, "n_models": 2, "n_spiked": 1}
        measures = {"counterfactual": DROPS}
        question = settle(["Random", "ClassRandom"], task, store=tmp_path, measures=measures, **few)
        models, spiked, *arms = planned_trainings(question)
        assert (models.n_missing, models.at_most) == (2, "")
        assert (spiked.n_missing, bool(spiked.at_most)) == (30, True)
        sets = 2 * 3 * 2 * 2  # methods, models, test points and counts
        assert [(arm.n_missing, bool(arm.at_most)) for arm in arms] == [(2 * (1 + sets), True)] * 2
        assert [arm.purpose.split()[-1] for arm in arms] == ["proponents", "opponents"]
        trained.clear()
        answer(question)
        assert 2 + 1 < sum(trained) < sum(e.n_missing for e in (models, spiked, *arms))
        models, spiked, *_ = planned_trainings(question)
        assert (models.n_missing, spiked.n_missing, spiked.n_runs, spiked.at_most) == (0, 0, 1, "")

    @pytest.mark.slow
    def test_of_stopped_models_go_on_behind_the_last(self, task, tmp_path, trained, always_spiked):
        _, seed = train_spiked(task, tmp_path)
        train_checkpoints(task, seed, tmp_path, even_epochs(task.training.epochs, 3))
        few = {**FEW, "n_spiked": 2}
        question = settle(CHECKPOINTS, task, store=tmp_path, measures=["lds"], **few)
        _, _, spiked, checkpoints = planned_trainings(question)
        assert (spiked.n_stored, spiked.n_missing) == (1, 30)
        assert (checkpoints.n_stored, checkpoints.n_missing) == (1, 2)
        answer(question)
        assert sum(estimate.n_missing for estimate in planned_trainings(question)) == 0

    def test_are_said_in_a_sentence_each(self, task, tmp_path):
        measures = {"lds": {}, "mislabel": {}, "leakage": {"counts": (2,)}}
        few = {**FEW, "n_spiked": 1}
        question = settle(CHECKPOINTS, task, store=tmp_path, measures=measures, **few)
        said = [str(estimate) for estimate in planned_trainings(question)]
        assert [sentence.split(" clusters")[0] for sentence in said] == [
            "LDS: 12 retrainings of",
            "attributed models: 1 training of",
            "models stopped on a spike: 30 trainings of",
            "checkpoints of attributed models: 2 trainings of",
            "mislabel: 1 training of",
            "mislabel, checkpoints of attributed models: 1 training of",
            "mislabel, cross-fitted halves: 2 trainings of",
            "leakage: 1 training of",
            "leakage, checkpoints of attributed models: 1 training of",
        ]
        assert said[2].endswith(
            " with 1 worker: each search ends at the first model with a spike of its loss."
        )
        assert ": 0 are in the store, 2 are to do one by one, which takes about " in said[3]

    @pytest.mark.slow
    def test_a_measure_of_one_s_own_is_known_by_its_name(self, task, tmp_path, monkeypatch, trained):
        monkeypatch.setitem(MEASURES, "accuracy", Accuracy())
        few = {**FEW, "n_models": 2}
        question = settle(["Random"], task, store=tmp_path, measures=["accuracy", "lds"], **few)
        assert [e.purpose for e in planned_trainings(question)] == ["attributed models", "LDS"]
        found = compare(["Random"], task, store=tmp_path, measures=["accuracy", "lds"], **few)
        assert [row["name"] for row in found.others["accuracy"]] == ["seed 0", "seed 1"]
        assert found.frame("accuracy")["accuracy"].min() > 0.5
        assert found.to_dict()["others"]["accuracy"] == found.others["accuracy"]
        assert list(found.protocol["models"]) == ["seed 0", "seed 1"]
        with console.capture() as captured:
            show_comparison(found)
        assert f"{found.others['accuracy'][1]['accuracy']:.3f}" in captured.get()
        with pytest.raises(ValueError, match=r"`measures\['accuracy'\]` must have no options; got 'k'"):
            settle(["Random"], task, store=tmp_path, measures={"accuracy": {"k": 1}})

    @pytest.mark.slow
    def test_models_that_no_measure_asks_for_are_not_trained(self, task, tmp_path):
        found = compare(["Random"], task, store=tmp_path, measures={"mislabel": FLIPS}, **FEW)
        assert found.protocol["models"] == {}
        assert len(list(tmp_path.glob("attributed-*"))) == 2


# What is said after it.


@pytest.mark.slow
@pytest.mark.parametrize("measures", [{"lds": {}}, {"counterfactual": DROPS}])
def test_a_model_that_has_learned_nothing_is_named(task, tmp_path, measures):
    idle = replace(task, training=replace(task.training, learning_rate=0.0), note="A note.")
    note = compare(["Random"], idle, store=tmp_path, measures=measures, **FEW).note
    assert re.fullmatch(
        r"A note\. Attributed model seed 0 has learned nothing: it is right for .*% of its training "
        r"examples, and .* have the most frequent label\. Its scores mean nothing\.",
        note,
    )
    able = replace(idle, training=replace(task.training, epochs=20))
    assert compare(["Random"], able, store=tmp_path, measures=measures, **FEW).note == "A note."


class TestDivergence:
    @pytest.mark.slow
    def test_of_few_halves_leaves_them_out_and_says_so(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(Unlucky, "seeds", (1_000_003 + 2,))
        task = replace(task, build_model=Unlucky)
        few = {**FEW, "engine": "processes", "measures": ["lds", "calibration", "linearized"]}
        with pytest.warns(
            UserWarning, match=r"1 of 12 retrainings of clusters diverged: .* \(subset 2, seed 0\)"
        ):
            found = compare(["STRIDE", "Random"], task, store=tmp_path, **few)
        assert found.protocol["left_out"] == [2]
        assert found.protocol["n_subsets"] == found.rows[0].lds.n_subsets == 11
        assert "1 of 12 halves are left out: a retraining of each diverged." in found.summary()
        json.dumps(found.to_dict(), allow_nan=False)

    def test_of_many_is_an_error_that_says_what_helps(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(Unlucky, "seeds", (1_000_003 + 2, 1_000_003 + 5))
        task = replace(task, build_model=Unlucky)
        with (
            pytest.warns(UserWarning, match="2 of 12 retrainings of clusters diverged"),
            pytest.raises(
                ValueError,
                match=r"`training` must let at least 90% of the 12 subsets .*\(subset 2, seed 0\), "
                r"\(subset 5, seed 0\)\. Train with smaller steps",
            ),
        ):
            compare(["STRIDE"], task, store=tmp_path, **{**FEW, "engine": "processes"})

    @pytest.mark.slow
    def test_of_a_counterfactual_is_an_error(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(Unlucky, "seeds", (1_000_003,))
        task = replace(task, build_model=Unlucky)
        measures = {"counterfactual": {"counts": (5,), "n_points": 1, "n_seeds": 1}}
        with (
            pytest.warns(UserWarning, match="retrainings of clusters diverged"),
            pytest.raises(
                ValueError, match=r"`training` must let all of the 2 subsets of clusters converge; got"
            ),
        ):
            compare(["Similarity"], task, store=tmp_path, measures=measures, **FEW)


class TestSilence:
    @pytest.mark.slow
    def test_is_told_in_words_and_compared_with_nothing(self, task, tmp_path):
        found = compare(
            ["STRIDE", silent, "Random"], task, store=tmp_path, measures=["lds", "calibration"], **FEW
        )
        sentences = found.summary()
        assert "silent ranks nothing: its LDS is undefined for all 20 test points." in sentences
        assert not any("silent" in s for s in sentences if "these data" in s or "predicts" in s)
        assert "nan" not in " ".join(sentences)
        with console.capture() as captured:
            show_comparison(found)
        assert "nan" not in captured.get()
        assert "undefined" in captured.get()
        written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert "NaN" not in write_comparison(written, tmp_path / "report.html").read_text(encoding="utf-8")

    @pytest.mark.slow
    def test_of_the_first_row_leaves_nothing_to_compare_with(self, task, tmp_path):
        found = compare([silent, "Random"], task, store=tmp_path, measures=["lds"], **FEW)
        assert found.summary() == ["silent ranks nothing: its LDS is undefined for all 20 test points."]

    @pytest.mark.slow
    def test_of_all_rows_still_makes_a_report(self, task, tmp_path):
        other = MethodSpec("other", adapter(Silent))
        found = compare([silent, other], task, store=tmp_path, measures=["lds", "calibration"], **FEW)
        assert found.summary() == [
            "silent and other rank nothing: their LDS is undefined for all 20 test points."
        ]
        written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        html = write_comparison(written, tmp_path / "report.html").read_text(encoding="utf-8")
        assert "rank nothing" in html

    @pytest.mark.slow
    def test_about_some_points_is_said(self, planted, tmp_path):
        class Few(Planted):
            def influence(self, inputs, **options):
                scores = super().influence(inputs, **options)
                return torch.where(torch.arange(len(scores))[:, None] < 2, scores, 0)

        found = compare([MethodSpec("few", adapter(Few))], planted, store=tmp_path, measures=["lds"], **FEW)
        assert found.summary()[-1] == (
            "LDS is undefined for some test points of few: these count as 0 against other methods."
        )

    @pytest.mark.slow
    def test_without_resamples_no_winner_is_named(self, planted, tmp_path):
        few = {**FEW, "n_resamples": 0}
        found = compare(["Random", "Similarity"], planted, store=tmp_path, measures=["lds"], **few)
        assert found.summary()[1:] == ["No intervals were asked for: no method is called better."]


def test_detectors_are_known_by_name():
    assert set(DETECTORS) == {"loss", "confident learning", "confident learning, cross-fitted"}


@pytest.mark.slow
def test_a_contender_is_asked_for_its_own_cache(task, tmp_path):
    """The row that vouches reaches the cache of every measure."""
    vouched = MethodSpec("mine", adapter(STRIDE), cache_key="one")
    measures = {"lds": {}, "leakage": {"counts": (3,)}, "mislabel": {"n_held_out": 10, "detectors": ()}}
    compare([vouched], task, store=tmp_path, measures=measures, **FEW)
    first = sorted(path.name for path in (tmp_path / "answers").iterdir())
    compare([replace(vouched, cache_key="two")], task, store=tmp_path, measures=measures, **FEW)
    second = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert len(second) == 2 * len(first)
    compare([vouched], task, store=tmp_path, measures=measures, **FEW)
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == second
