"""Option objects: every option validates itself, survives JSON and is documented."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import numpy as np
import pytest

from stride_captum import (
    ClosedForm,
    Features,
    Lasso,
    LeftRegular,
    Partition,
    RandomSubsets,
    Ridge,
    Trained,
    adapters,
)
from stride_captum.conformance.toy_problems import MLP, trained
from stride_captum.designs import Subsets
from stride_captum.operators import Operators, operators_of
from stride_captum.options import Options
from stride_captum.system.memory import parse_bytes

KINDS = [ClosedForm, Trained, Features, RandomSubsets, Partition, LeftRegular, Lasso, Ridge]
POSITIVE = [
    *((ClosedForm, name) for name in ("damping", "head_damping", "temperature")),
    *((Trained, name) for name in ("learning_rate", "sketch_ridge")),
]
NOT_NEGATIVE = [
    (ClosedForm, "threshold"),
    *((Trained, f"{name}_weight") for name in ("fidelity", "stability", "linearity")),
    (Trained, "weight_decay"),
]
COUNTS = [
    *((Features, name) for name in ("max_width", "projection_width")),
    *((Trained, name) for name in ("rank", "iterations", "batch_size", "sketch_width")),
    *((kind, name) for kind in (RandomSubsets, Partition) for name in ("n_subsets", "size")),
    (LeftRegular, "degree"),
]
SEEDS = [(Features, "seed"), (Trained, "seed")]
OTHERS = {
    (ClosedForm, "residuals"),
    (Features, "projection"),
    (LeftRegular, "n_subsets"),
    (Trained, "subsets"),
    (Trained, "recovery"),
    (Trained, "preset"),
    *((kind, name) for kind in (Lasso, Ridge) for name in ("alpha", "center")),
}
CHOICES = [
    (kind, field.name)
    for kind in KINDS
    for field in dataclasses.fields(kind)
    if getattr(get_type_hints(kind)[field.name], "__origin__", None) is Literal
]


def test_every_option_is_tested_here_and_documented():
    every = {(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)}
    assert every == {*POSITIVE, *NOT_NEGATIVE, *COUNTS, *SEEDS, *CHOICES, *OTHERS}
    for kind, name in every:
        assert f"        {name}: " in (kind.__doc__ or ""), (kind, name)


@pytest.mark.parametrize(("kind", "name"), POSITIVE)
@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "0.3", True])
def test_positive_numbers(kind, name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive number; got {wrong!r}"):
        kind(**{name: wrong})
    assert getattr(kind(**{name: 2}), name) == 2


@pytest.mark.parametrize(("kind", "name"), NOT_NEGATIVE)
@pytest.mark.parametrize("wrong", [-1e-9, float("nan"), float("inf"), None, False])
def test_numbers_of_at_least_zero(kind, name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of at least 0; got {wrong!r}"):
        kind(**{name: wrong})
    assert getattr(kind(**{name: 0}), name) == 0


@pytest.mark.parametrize(("kind", "name"), COUNTS)
@pytest.mark.parametrize("wrong", [0, -3, 1.5, True, "4"])
def test_counts(kind, name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1; got {wrong!r}"):
        kind(**{name: wrong})
    assert getattr(kind(**{name: 1}), name) == 1


@pytest.mark.parametrize(("kind", "name"), SEEDS)
@pytest.mark.parametrize("wrong", [-1, None])
def test_seeds(kind, name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 0; got {wrong}"):
        kind(**{name: wrong})
    assert getattr(kind(**{name: 0}), name) == 0


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_choices(kind, name):
    allowed = get_args(get_type_hints(kind)[name])
    for choice in allowed:
        assert getattr(kind(**{name: choice}), name) == choice
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*{allowed[-1]}.*got .nonsense"):
        kind(**{name: "nonsense"})


PENALTY = "`alpha` must be a fraction of alpha_max above 0, or a rule; got "
MULTIPLE = "`alpha` must be a multiple of `recovery.ridge_scale` above 0; got "


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Features, {"projection": "svd"}, "`projection` must be None, 'random' or 'pca'; got 'svd'"),
        (ClosedForm, {"residuals": "bth"}, "`residuals` must be one of .*; got 'bth'. Nearest: 'both'"),
        (ClosedForm, {"curvature": "kroneker"}, "got 'kroneker'. Nearest: 'kronecker'"),
        (Lasso, {"alpha": -0.1}, PENALTY + "-0.1"),
        (Lasso, {"alpha": None}, PENALTY + "None"),
        (Lasso, {"alpha": float("nan")}, PENALTY + "nan"),
        (Lasso, {"alpha": float("inf")}, PENALTY + "inf"),
        (Lasso, {"alpha": 0.0}, PENALTY + r"0\.0\. .* use Ridge with a small one"),
        (Lasso, {"alpha": "bik"}, "one of 'bic', 'aic', 'cross-validation'; got 'bik'. Nearest: 'bic'"),
        (Lasso, {"center": 1}, "`center` must be True or False; got 1"),
        (Ridge, {"alpha": 0}, MULTIPLE + r"0\."),
        (Ridge, {"alpha": "bic"}, "`alpha` must be a number for Ridge; got 'bic'. The rules choose among"),
        (Ridge, {"center": None}, "`center` must be True or False; got None"),
        (LeftRegular, {"n_subsets": 10}, "`degree` must be less than n_subsets = 10; got 10"),
        (LeftRegular, {"n_subsets": 0}, "`n_subsets` must be an integer of at least 1; got 0"),
        (Trained, {"preset": "minst"}, "`preset` must be one of 'mnist', 'cifar10'; got 'minst'"),
    ],
)
def test_other_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(("name", "wrong"), [("subsets", 50), ("recovery", "lasso")])
def test_parts_are_objects(name, wrong):
    with pytest.raises(TypeError, match=f"`{name}` must be .*; got {type(wrong).__name__}"):
        Trained(**{name: wrong})


@pytest.mark.parametrize(
    "wrong", ["", "MiB", "-1MiB", "0GiB", "0.1b", "infMiB", "nanKB", "5 bytes", 0, -1, None, True]
)
def test_amounts_of_memory_that_are_none(wrong):
    with pytest.raises(
        ValueError, match="`memory_budget` must be a positive number of bytes or text such as"
    ):
        parse_bytes(wrong)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("3KiB", 3072),
        ("1.5 mib", 3 << 19),
        ("2GiB", 1 << 31),
        ("7KB", 7000),
        ("2 MB", 2 * 10**6),
        ("1gb", 10**9),
        (" 12 B ", 12),
        ("12", 12),
        (12, 12),
        (1e6, 10**6),
    ],
)
def test_amounts_of_memory(text, amount):
    assert parse_bytes(text) == amount


VALUES = [
    ClosedForm(damping=0.7),
    Features(select="penultimate"),
    Trained.paper("cifar10"),
    Trained(seed=7, subsets=LeftRegular(40, degree=3), recovery=Lasso(alpha="bic")),
    Trained(recovery=Ridge(alpha=2.0)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.name)
def test_round_trip_through_json(value):
    assert type(value).from_dict(json.loads(json.dumps(value.to_dict(), allow_nan=False))) == value
    assert Options.from_dict(value.to_dict()) == value


def test_an_option_that_does_not_exist_is_refused_with_its_neighbor():
    match = r"`options` must be options of ClosedForm; got 'dampening'\. Nearest: 'damping'"
    with pytest.raises(ValueError, match=match):
        ClosedForm.from_dict({"dampening": 1})
    with pytest.raises(ValueError, match="`options` must be options of ClosedForm; got 'rank'"):
        Operators.from_dict({"name": "newton", "rank": 4})
    with pytest.raises(TypeError, match="rank"):
        ClosedForm(rank=4)


def test_they_are_frozen_hashable_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Trained().rank = 3  # type: ignore[misc]
    assert len({Trained(), Trained(), Trained(seed=1)}) == 2
    for kind in (ClosedForm, Trained, Features, Lasso, Ridge):
        with pytest.raises(TypeError):
            kind(0.1)


def test_operators_have_names():
    assert operators_of("closed-form") == operators_of("newton") == ClosedForm()
    assert operators_of("trained") == Trained()
    with pytest.raises(
        ValueError, match=r"`operators` must be one of 'closed-form', 'trained'.*got 'tranied'"
    ):
        operators_of("tranied")
    with pytest.raises(TypeError, match=r"`operators` must be ClosedForm\(...\), .* or a name; got dict"):
        operators_of({"damping": 0.1})


def test_a_member_of_a_family_is_known_by_its_name():
    @dataclasses.dataclass(frozen=True)
    class Halves(Subsets):
        name: ClassVar[str] = "test.halves"

        def memberships(self, n_train: int, seed: int) -> Any:
            return RandomSubsets(4, size=n_train // 2).memberships(n_train, seed)

    whole = Trained(subsets=Halves())
    assert Operators.from_dict(whole.to_dict()) == whole


class TestPaper:
    @pytest.mark.parametrize(
        ("data", "rank", "learning_rate", "iterations", "linearity", "stability"),
        [("mnist", 32, 0.005, 250, 10.0, 1.0), ("cifar10", 64, 0.001, 200, 1.0, 1.0)],
    )
    def test_table_4(self, data, rank, learning_rate, iterations, linearity, stability):
        preset = Trained.paper(data)
        assert (preset.rank, preset.learning_rate, preset.iterations) == (rank, learning_rate, iterations)
        assert (preset.linearity_weight, preset.stability_weight) == (linearity, stability)
        assert (preset.fidelity_weight, preset.weight_decay, preset.schedule) == (1.0, 0.0, "constant")

    @pytest.mark.parametrize("data", ["mnist", "cifar10"])
    def test_b2_and_the_sections(self, data):
        preset = Trained.paper(data)
        assert preset.subsets == Partition(50, size=100)
        assert (preset.encoder, preset.steering, preset.batch_size) == ("shared", "logits", 100)
        assert (preset.sketch_width, preset.sketch_ridge, preset.linearity) == (64, 1.0, "example")
        assert preset.recovery == Lasso(alpha=0.01, center=False)
        expected = {"response": "logit", "target": "predicted", "features": Features(select="penultimate")}
        assert preset.defaults() == expected
        assert Trained().defaults() == {}

    def test_changes_replace_the_preset(self):
        preset = Trained.paper("mnist", rank=8, encoder="per-subset")
        assert (preset.rank, preset.encoder, preset.iterations) == (8, "per-subset", 250)

    def test_other_data_are_refused(self):
        match = r"`data` must be one of 'mnist', 'cifar10'; got 'minst'\. Nearest: 'mnist'"
        with pytest.raises(ValueError, match=match):
            Trained.paper("minst")


class TestDesigns:
    def test_left_regular_puts_every_example_in_as_many_subsets(self):
        X = LeftRegular(40, degree=7).draw(30_000, seed=1)
        assert X.shape == (40, 30_000)
        assert set(np.asarray(X.sum(axis=0)).ravel()) == {7.0}
        assert np.array_equal(X.toarray(), LeftRegular(40, degree=7).draw(30_000, seed=1).toarray())
        assert not np.array_equal(X.toarray(), LeftRegular(40, degree=7).draw(30_000, seed=2).toarray())
        sizes = np.asarray(X.sum(axis=1)).ravel()  # binomial: mean 5,250, deviation 66
        assert np.abs(sizes - 5250).max() < 5 * 66

    def test_random_subsets_hold_an_example_about_ten_times(self):
        assert RandomSubsets(50).memberships(1000, 0).nnz == 50 * 200
        assert RandomSubsets(4).memberships(1000, 0).nnz == 4 * 500
        assert RandomSubsets(4, size=3).memberships(1000, 0).nnz == 12

    def test_a_partition_covers_everything_once_unless_it_has_a_size(self):
        assert (np.asarray(Partition(7).draw(100, 0).sum(axis=0)) == 1).all()
        with pytest.warns(UserWarning, match="58 of 100 training examples are in no subset"):
            assert Partition(7, size=6).draw(100, 0).nnz == 42


@pytest.mark.parametrize("cls", ["STRIDE", *adapters.__all__])
def test_constructors_check_what_a_query_takes(cls):
    import stride_captum

    model, train, _ = trained(MLP, n_train=12, steps=1)
    kind = getattr(adapters, cls, None) or getattr(stride_captum, cls)
    if not issubclass(kind, stride_captum.InfluenceMethod) or cls == "CaptumInfluence":
        pytest.skip("not a method that is built of a model and data alone")
    for argument, wrong, must in (
        ("response", "margn", "one of 'margin'.*Nearest: 'margin'"),
        ("normalize", "l2", "None, 'cosine' or 'deviation'; got 'l2'"),
        ("target", "labels", "'label', 'predicted' or class indices; got 'labels'"),
        ("memory_budget", "0GiB", "a positive number of bytes"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` must be {must}"):
            kind(model, train, **{argument: wrong})


def test_a_notebook_shows_what_was_changed_first():
    assert "all defaults" in ClosedForm()._repr_html_()
    html = ClosedForm(damping=0.7)._repr_html_()
    changed, _, every = html.partition("<details>")
    assert "0.7" in changed
    assert "temperature" not in changed
    assert "temperature" in every


def test_numbers_of_numpy_are_numbers():
    found = Lasso(alpha=np.float32(0.5), center=np.bool_(False))
    assert found == Lasso(alpha=0.5, center=False)
    assert RandomSubsets(np.int64(20)) == RandomSubsets(20)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
