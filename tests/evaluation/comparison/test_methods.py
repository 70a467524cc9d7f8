"""Rows of a comparison are built with exactly what their names say, and tuned among as many points."""

import gc
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import MLP, trained

from stride_captum import STRIDE, ClosedForm, Partition, Trained, adapters
from stride_captum.evaluation import MethodSpec, compare, load_task
from stride_captum.evaluation.comparison.shared.methods import (
    DEFAULT_METHODS,
    GRID_SIZE,
    METHODS,
    adapter,
    grid,
    stride,
)
from stride_captum.evaluation.tasks.networks import TrainingSettings


@pytest.fixture(scope="module")
def planted():
    model, train, _ = trained(MLP)
    return model, train


def built(name, planted, **options):
    spec = METHODS[name]
    if not spec.available:
        pytest.skip(f"needs {spec.needs}")
    return spec(*planted, options)


def defaults(cls):
    found = {}
    for above in reversed(cls.__mro__):
        if "__init__" in vars(above):
            found |= {k: p.default for k, p in inspect.signature(above).parameters.items()}
    return found


GRADIENT_METHODS = ("EKFAC", "DiagonalEKFAC", "TRAK", "TracIn")
WITH_GRID = [name for name, spec in METHODS.items() if len(spec.grid) > 1]


def test_every_grid_has_as_many_points_and_no_point_twice():
    assert set(WITH_GRID) >= {"STRIDE (tuned)", "EKFAC", "TRAK, out-of-sample residuals", "KNNShapley"}
    for name in WITH_GRID:
        points = [tuple(point.items()) for point in METHODS[name].grid]
        assert len(points) == len(set(points)) == GRID_SIZE, name
    for name in ("STRIDE", "TracIn", "TracIn, 4 checkpoints", "Similarity", "Random"):
        assert METHODS[name].grid == ({},), name


@pytest.mark.parametrize("name", [n for n in WITH_GRID if not n.startswith("STRIDE")])
def test_without_a_choice_a_baseline_has_its_default_options_which_the_grid_holds(name, planted):
    spec = METHODS[name]
    method = built(name, planted, **spec.default)
    usual = defaults(type(method))
    if name.endswith("out-of-sample residuals"):
        usual |= {"residuals": "both", "temperature": 2.0}  # the temperature of None, without held-out data
    options = {option for point in spec.grid for option in point}
    for option in options - {"temperature"}:
        assert getattr(method, option) == usual[option], option
    assert {option: usual[option] for option in options} in [dict(point) for point in spec.grid]


def test_the_tuned_row_of_ours_holds_the_default(planted):
    assert {"temperature": 2.0, "damping": ClosedForm().damping} in METHODS["STRIDE (tuned)"].grid
    assert built("STRIDE (tuned)", planted).operators == ClosedForm()


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_our_residuals_are_out_of_sample_and_the_published_row_has_those_of_training(name, planted):
    cls = getattr(adapters, name)
    published, ours = built(name, planted), built(f"{name}, out-of-sample residuals", planted)
    assert type(published) is type(ours) is cls
    assert (published.residuals, ours.residuals) == ("training", "both")
    for point in METHODS[name].grid:
        assert built(name, planted, **point).residuals == "training"
    grid = METHODS[f"{name}, out-of-sample residuals"].grid
    kinds = [built(f"{name}, out-of-sample residuals", planted, **point).residuals for point in grid]
    assert sorted(kinds) == ["both"] * 3 + ["temperature"] * 3  # each may be the better one
    assert all(point.get("temperature", 2.0) > 1 for point in grid)


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("STRIDE")])
def test_our_rows_differ_from_the_default_in_what_they_say(name, planted):
    operators, usual = built(name, planted).operators, ClosedForm()
    expected = {
        "STRIDE": usual,
        "STRIDE, checkpoints": usual,
        "STRIDE, cross-fitted": usual,
        "STRIDE (tuned)": usual,
        "STRIDE T=1": ClosedForm(residuals="training"),
        "STRIDE trained + Lasso": Trained(),
        "STRIDE trained, no linearity": Trained(linearity_weight=0.0),
        "STRIDE trained, no stability": Trained(stability_weight=0.0),
        "STRIDE trained, no LDS loss": Trained(linearity_weight=0.0, stability_weight=0.0),
        "STRIDE trained, layer1": Trained(),
        "STRIDE trained, conv": Trained(),
        "STRIDE paper (mnist)": Trained.paper("mnist", subsets=Partition(50)),
        "STRIDE paper (cifar10)": Trained.paper("cifar10", subsets=Partition(50)),
    }
    assert operators == expected[name]


@pytest.mark.parametrize("preset", ["mnist", "cifar10"])
def test_the_paper_s_row_is_the_preset_as_it_is_where_its_subsets_fit(planted, preset):
    enough = torch.utils.data.TensorDataset(torch.zeros(5000, 6), torch.zeros(5000, dtype=torch.int64))
    method = METHODS[f"STRIDE paper ({preset})"](planted[0], enough, {})
    assert method.operators == Trained.paper(preset)


def test_four_checkpoints_are_three_and_the_attributed_model(planted):
    spec = METHODS["TracIn, 4 checkpoints"]
    assert spec.n_checkpoints == 4
    states = [planted[0].state_dict()] * 4
    method = spec(*planted, {"checkpoints": states})
    assert type(method) is adapters.TracIn
    assert len(method.checkpoints) == 4
    others = {n: c.n_checkpoints for n, c in METHODS.items() if c.n_checkpoints != 1}
    assert others == {"TracIn, 4 checkpoints": 4, "STRIDE, checkpoints": "log"}
    method = METHODS["STRIDE, checkpoints"](*planted, {"checkpoints": states})
    assert (method.operators, len(method.checkpoints)) == (ClosedForm(), 4)


def test_options_that_are_settable_need_no_new_fit(planted):
    """A grid over them fits once: what is set must count as if it had been given."""
    damped = {n for n, spec in METHODS.items() if any("damping" in point for point in spec.grid)}
    assert {n for n, spec in METHODS.items() if "damping" in spec.settable} == damped - {"STRIDE (tuned)"}
    for name, spec in METHODS.items():
        for option in spec.settable:
            values = {point[option] for point in spec.grid}
            assert len(values) > 1, name
            method = built(name, planted, **{option: 1e-3}).fit()
            setattr(method, option, 0.1)
            _, _, test = trained(MLP)
            expected = built(name, planted, **{option: 0.1}).influence(test.tensors)
            torch.testing.assert_close(method.influence(test.tensors), expected, rtol=1e-4, atol=1e-6)


class Signed(STRIDE):
    """Scores times an option that can be set."""

    def __init__(self, *args, sign=1.0, **options):
        super().__init__(*args, **options)
        self.sign = sign

    def influence(self, *args, **options):
        return self.sign * super().influence(*args, **options)


@pytest.mark.parametrize("grid", [[{}, {"sign": -1.0}], [{"sign": -1.0}, {}, {"sign": -1.0}]])
@pytest.mark.slow
def test_a_point_that_leaves_a_settable_option_out_has_its_default(grid, tmp_path):
    training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    task = load_task("synthetic", preset="smoke", training=training)
    few = {"n_subsets": 8, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1, "n_resamples": 0}
    found = []
    for settable in (frozenset({"sign"}), frozenset()):
        spec = MethodSpec("signed", lambda m, d, o: Signed(m, d, **o), grid, settable=settable)
        (row,) = compare([spec], task, store=tmp_path / str(len(settable)), measures=["lds"], **few).rows
        found.append((row.options, row.lds.value))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_grid_over_a_settable_option_fits_once_although_points_are_refused(tmp_path, monkeypatch):
    training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    task = load_task("synthetic", preset="smoke", training=training)
    few = {"n_subsets": 8, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1, "n_resamples": 0}
    frozen, original = [], adapters.TRAK.fit

    def fit(self, *given):
        frozen.append(gc.get_freeze_count())
        return original(self, *given)

    monkeypatch.setattr(adapters.TRAK, "fit", fit)
    spec = replace(METHODS["TRAK"], grid=grid(damping=(3.0, 0.0, 1.0, 1e-30, 0.3)))
    (row,) = compare([spec], task, store=tmp_path, measures=["lds"], **few).rows
    assert row.options["damping"] in (3.0, 1.0, 0.3)
    assert len(frozen) == 1
    assert frozen[0] > gc.get_freeze_count() == 0  # collections look at what the row has made


def test_a_row_of_your_own_is_called_as_its_build_is(planted):
    row = MethodSpec("mine", stride(damping=1.0), default={"damping": 0.5})
    assert row(*planted, {}).operators.damping == 1.0
    assert row(*planted, row.default).operators.damping == 0.5
    assert isinstance(row(*planted, {}), STRIDE)
    similar = adapter(adapters.KNNShapley, k=7)
    assert (similar(*planted, {}).k, similar(*planted, {"k": 2}).k) == (7, 2)


def test_the_names_of_the_default_comparison_exist_and_the_first_is_ours():
    assert set(DEFAULT_METHODS) <= set(METHODS)
    assert DEFAULT_METHODS[0] == "STRIDE"
    assert np.all([name == METHODS[name].name for name in METHODS])
    assert grid(a=(1, 2), b=(3,)) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
