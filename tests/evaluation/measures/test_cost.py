from __future__ import annotations

import json

import pytest
import torch
from planted import MLP, built, expect_untouched, planted_classes
from torch import nn

from stride_captum.adapters import ClassRandom, Similarity
from stride_captum.evaluation.measures.cost import (
    Cost,
    cost_of,
    forward_seconds,
    measure_cost,
    median_cost,
)


def cost(fit=10.0, query=4.0, n=2, forward=0.5, peak=None):
    return Cost(fit_seconds=fit, query_seconds=query, n_queries=n, forward_seconds=forward, peak_bytes=peak)


class Counting(nn.Module):
    """Counts the examples of its forward passes and the modes they came in."""

    def __init__(self):
        super().__init__()
        self.network, self.seen, self.modes = MLP(), [], set()

    def forward(self, x):
        self.seen.append(len(x))
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.network(x)


def test_ratios_are_in_forward_passes_of_the_training_set():
    one = cost()
    assert one.fit_ratio == 20
    assert one.seconds_per_query == 2
    assert one.query_ratio == 4


def test_everything_is_written_as_json():
    read = json.loads(json.dumps(cost(peak=1024).to_dict(), allow_nan=False))
    assert read["fit_seconds"] == 10
    assert read["peak_bytes"] == 1024
    assert (read["fit_ratio"], read["query_ratio"]) == (20, 4)
    assert cost().to_dict()["peak_bytes"] is None


def test_several_runs_are_one_by_medians_and_the_highest_peak():
    runs = [cost(fit=f, query=q, peak=p) for f, q, p in ((1, 9, 5), (2, 4, None), (9, 1, 7))]
    assert median_cost(runs) == cost(fit=2, query=4, peak=7)
    assert median_cost([cost()]).peak_bytes is None
    with pytest.raises(ValueError, match=r"`costs` must be of one number of queries; got \[2, 3\]"):
        median_cost([cost(), cost(n=3)])
    with pytest.raises(ValueError, match=r"`costs` must be of one number of queries; got \[\]"):
        median_cost([])


def test_a_forward_pass_reads_every_example_once_a_repeat_and_leaves_no_trace():
    model = built(Counting).train()
    data = planted_classes(25)
    with expect_untouched(model):
        assert forward_seconds(model, data, batch_size=10, repeats=2) > 0
    assert model.seen == [10, 10, 5] * 3
    assert model.modes == {(False, False)}
    with pytest.raises(ValueError, match="`repeats` must be at least 1; got 0"):
        forward_seconds(model, data, repeats=0)


def test_the_cost_of_a_method_is_what_it_says_of_itself(planted):
    model, train, test = planted
    method = Similarity(model, train).fit()
    method.influence(test.tensors)
    method.fit_seconds_, method.query_seconds_, method.peak_bytes_ = 3.0, 2.0, 17
    assert cost_of(method, 7, 0.5) == cost(fit=3, query=2, n=7, peak=17)
    method.peak_bytes_ = None
    assert cost_of(method, 7, 0.5).peak_bytes is None


def test_a_method_that_has_not_worked_has_no_cost(planted):
    model, train, _ = planted
    method = Similarity(model, train)
    with pytest.raises(ValueError, match=r"`method` must have `fit_seconds_`; got none\. Call `influence`"):
        cost_of(method, 1, 1.0)
    with pytest.raises(ValueError, match="`method` must have `query_seconds_`; got none"):
        cost_of(method.fit(), 1, 1.0)


def test_all_methods_are_measured_on_the_same_points_with_their_options(planted):
    model, train, test = planted
    calls = []

    def build(cls):
        def make(model, dataset, options):
            calls.append((cls, options))
            return cls(model, dataset, **options)

        return make

    methods = {"one": build(Similarity), "two": build(ClassRandom)}
    costs = measure_cost(methods, model, train, test.tensors, options={"two": {"seed": 3}}, repeats=2)
    assert calls == [(Similarity, {})] * 2 + [(ClassRandom, {"seed": 3})] * 2
    assert list(costs) == ["one", "two"]
    for found in costs.values():
        assert found.n_queries == 7
        assert min(found.fit_seconds, found.query_seconds, found.forward_seconds) > 0
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        measure_cost(methods, model, train, test.tensors, repeats=0)


def test_a_cost_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`n_queries` must be at least 1; got 0"):
        cost(n=0)
    with pytest.raises(ValueError, match=r"`forward_seconds` must be positive; got 0\.0"):
        cost(forward=0.0)
