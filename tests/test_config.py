from __future__ import annotations

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest

from stride_captum import config as options
from stride_captum.config import STRIDEConfig, parse_bytes

POSITIVE = ["damping", "head_damping", "learning_rate", "sketch_ridge", "temperature"]
NOT_NEGATIVE = ["threshold", "fidelity_weight", "stability_weight", "linearity_weight", "weight_decay"]
COUNTS = [
    "max_width",
    "rank",
    "iterations",
    "batch_size",
    "sketch_width",
    "n_subsets",
    "subset_size",
    "projection_width",
]
CHOICES = {
    "operators": options.Operators,
    "response": options.Response,
    "feature_layers": options.FeatureLayers,
    "residuals": options.Residuals,
    "curvature": options.Curvature,
    "encoder": options.Encoder,
    "steering": options.Steering,
    "linearity": options.Linearity,
    "schedule": options.Schedule,
    "subsets": options.Subsets,
    "coverage": options.Coverage,
    "recovery": options.Recovery,
}
OTHERS = {
    "target",
    "normalize",
    "projection",
    "precision",
    "memory_budget",
    "alpha",
    "center",
    "seed",
}


def test_every_option_is_tested_here_and_documented():
    names = {field.name for field in dataclasses.fields(STRIDEConfig)}
    assert names == {*POSITIVE, *NOT_NEGATIVE, *COUNTS, *CHOICES, *OTHERS}
    for name in names:
        assert f"        {name}: " in (STRIDEConfig.__doc__ or "")


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "0.3", True])
def test_positive_numbers(name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive number; got {wrong!r}"):
        STRIDEConfig(**{name: wrong})
    assert getattr(STRIDEConfig(**{name: 2}), name) == 2


@pytest.mark.parametrize("name", NOT_NEGATIVE)
@pytest.mark.parametrize("wrong", [-1e-9, float("nan"), float("inf"), None, False])
def test_numbers_of_at_least_zero(name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of at least 0; got {wrong!r}"):
        STRIDEConfig(**{name: wrong})
    assert getattr(STRIDEConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("wrong", [0, -3, 1.5, True, "4"])
def test_counts(name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1; got {wrong!r}"):
        STRIDEConfig(**{name: wrong})
    assert getattr(STRIDEConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    allowed = get_args(CHOICES[name])
    others = {"subsets": "partition", "subset_size": 5}
    for choice in allowed:
        assert getattr(STRIDEConfig(**{**others, name: choice, **_needs(name, choice)}), name) == choice
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*{allowed[-1]}.*got .nonsense"):
        STRIDEConfig(**{name: "nonsense"})


def _needs(name, choice):
    return {"coverage": "partition"} if (name, choice) == ("subsets", "random") else {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 3}, "`target` must be one of 'label', 'predicted'; got 3"),
        ({"normalize": "l2"}, "`normalize` must be None or 'cosine'; got 'l2'"),
        ({"precision": "float16"}, "`precision` must be one of 'float32', 'tf32', 'bfloat16'; got 'float16'"),
        ({"response": "margn"}, "got 'margn'. Nearest: 'margin'"),
        ({"alpha": -0.1}, "`alpha` must be a fraction of alpha_max of at least 0, or a rule; got -0.1"),
        ({"alpha": None}, "`alpha` must be a fraction of alpha_max of at least 0, or a rule; got None"),
        ({"alpha": float("nan")}, "`alpha` must be a fraction of alpha_max"),
        ({"alpha": float("inf")}, "`alpha` must be a fraction of alpha_max"),
        (
            {"alpha": 0.0},
            r"`alpha` must be above 0 for the Lasso; got 0\. .* use recovery='ridge' with a small",
        ),
        ({"alpha": 0, "recovery": "ridge"}, r"`alpha` must be above 0 for ridge; got 0\."),
        (
            {"alpha": "bic", "recovery": "ridge"},
            r"`alpha` must be a number for recovery='ridge'; got 'bic'\. The rules choose among fractions",
        ),
        (
            {"alpha": "bik"},
            "`alpha` must be one of 'bic', 'aic', 'cross-validation'; got 'bik'. Nearest: 'bic'",
        ),
        ({"center": 1}, "`center` must be True or False; got 1"),
        ({"seed": -1}, "`seed` must be an integer of at least 0; got -1"),
        ({"seed": None}, "`seed` must be an integer of at least 0; got None"),
        (
            {"coverage": "paper"},
            "`coverage` must be 'paper' only with subsets='partition' and a subset_size; "
            r"got subsets='random', subset_size=None. Use STRIDEConfig.paper\('mnist'\)",
        ),
        ({"coverage": "paper", "subsets": "partition"}, "got subsets='partition', subset_size=None"),
        ({"coverage": "paper", "subset_size": 9}, "got subsets='random', subset_size=9"),
    ],
)
def test_other_options(changes, message):
    with pytest.raises(ValueError, match=message):
        STRIDEConfig(**changes)


@pytest.mark.parametrize(
    "wrong", ["", "MiB", "-1MiB", "0GiB", "0.1b", "infMiB", "nanKB", "5 bytes", 0, -1, None, True]
)
def test_amounts_of_memory_that_are_none(wrong):
    with pytest.raises(
        ValueError, match="`memory_budget` must be a positive number of bytes or text such as"
    ):
        STRIDEConfig(memory_budget=wrong)


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


@pytest.mark.parametrize(
    "value", [STRIDEConfig(), STRIDEConfig.paper("cifar10"), STRIDEConfig(alpha="bic", seed=7)]
)
def test_round_trip_through_json(value):
    assert STRIDEConfig.from_dict(json.loads(json.dumps(value.to_dict(), allow_nan=False))) == value


def test_an_option_that_does_not_exist_is_refused_with_its_neighbour():
    with pytest.raises(
        ValueError, match=r"`options` must hold options of STRIDEConfig; got 'dampening'\. Nearest: 'damping'"
    ):
        STRIDEConfig.from_dict({"dampening": 1})


def test_is_frozen_hashable_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STRIDEConfig().rank = 3  # type: ignore[misc]
    assert len({STRIDEConfig(), STRIDEConfig(), STRIDEConfig(seed=1)}) == 2
    with pytest.raises(TypeError):
        STRIDEConfig("newton")  # type: ignore[misc]


class TestPaper:
    @pytest.mark.parametrize(
        ("data", "rank", "learning_rate", "iterations", "linearity", "stability"),
        [("mnist", 32, 0.005, 250, 10.0, 1.0), ("cifar10", 64, 0.001, 200, 1.0, 1.0)],
    )
    def test_table_4(self, data, rank, learning_rate, iterations, linearity, stability):
        preset = STRIDEConfig.paper(data)
        assert (preset.rank, preset.learning_rate, preset.iterations) == (rank, learning_rate, iterations)
        assert (preset.linearity_weight, preset.stability_weight) == (linearity, stability)
        assert (preset.fidelity_weight, preset.weight_decay, preset.schedule) == (1.0, 0.0, "constant")

    @pytest.mark.parametrize("data", ["mnist", "cifar10"])
    def test_b2_and_the_sections(self, data):
        preset = STRIDEConfig.paper(data)
        assert preset.operators == "trained"
        assert (preset.subsets, preset.n_subsets, preset.subset_size) == ("partition", 50, 100)
        assert preset.coverage == "paper"
        assert preset.feature_layers == "penultimate"
        assert (preset.response, preset.target) == ("logit", "predicted")
        assert (preset.encoder, preset.steering, preset.batch_size) == ("shared", "logits", 100)
        assert (preset.sketch_width, preset.sketch_ridge, preset.linearity) == (64, 1.0, "example")
        assert (preset.recovery, preset.alpha, preset.center) == ("lasso", 0.01, False)

    def test_changes_replace_the_preset(self):
        preset = STRIDEConfig.paper("mnist", rank=8, encoder="per-subset")
        assert (preset.rank, preset.encoder, preset.iterations) == (8, "per-subset", 250)

    def test_other_data_are_refused(self):
        with pytest.raises(
            ValueError, match=r"`data` must be one of 'mnist', 'cifar10'; got 'minst'\. Nearest: 'mnist'"
        ):
            STRIDEConfig.paper("minst")


def test_a_notebook_shows_what_was_changed_first():
    assert "all defaults" in STRIDEConfig()._repr_html_()
    html = STRIDEConfig(damping=0.7)._repr_html_()
    changed, _, every = html.partition("<details>")
    assert "0.7" in changed
    assert "temperature" not in changed
    assert "temperature" in every


def test_numbers_of_numpy_are_numbers():
    config = STRIDEConfig(damping=np.float32(0.5), n_subsets=np.int64(20), center=np.bool_(False))
    assert config == STRIDEConfig(damping=0.5, n_subsets=20, center=False)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
