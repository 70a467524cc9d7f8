"""Second moments: sums of the definition, in every precision and at every size of the features."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stride_captum.closed_form import moments as module
from stride_captum.closed_form.moments import Moments, feature_moments, scaled_features
from stride_captum.system.to_device import working_dtype


def problem(n: int = 60, widths: tuple[int, ...] = (5, 3), dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, sum(widths), dtype=torch.float64, generator=generator) + 0.5
    return features.to(dtype), torch.randint(4, (n,), generator=generator)


def test_sums_over_blocks_are_those_of_the_definition():
    features, labels = problem(9000, (2, 1))
    moments = feature_moments(features, labels, 4, [2, 1])
    h = torch.cat([features, torch.ones(9000, 1)], dim=1)
    torch.testing.assert_close(moments.gram, h.T @ h)
    torch.testing.assert_close(moments.targets, h.T @ F.one_hot(labels, 4).double())
    phi = h * moments.scale
    torch.testing.assert_close(moments.second_moment, phi.T @ phi / 9000)
    torch.testing.assert_close(moments.mean, phi.mean(0))
    for layer in (phi[:, :2], phi[:, 2:3], phi[:, 3:]):
        assert float(layer.square().sum(1).mean()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_summed_in_float32_or_more(dtype):
    features = torch.full((9000, 2), 30.0, dtype=dtype)
    moments = feature_moments(features, torch.zeros(9000, dtype=torch.long), 2, [2])
    assert moments.gram.tolist() == [[8.1e6, 8.1e6, 2.7e5], [8.1e6, 8.1e6, 2.7e5], [2.7e5, 2.7e5, 9000]]
    assert moments.targets.dtype == torch.float64
    assert working_dtype(features) == torch.float32
    assert scaled_features(features, moments.scale).dtype == torch.float32


def test_sums_by_class_lose_no_digits_to_many_rows(monkeypatch):
    """Features behind a ReLU are of one sign: a sum in float32 over all rows would be off by 2e-6."""
    monkeypatch.setattr(module, "_CHEAP", 0)  # or all would be float64
    features = torch.rand(8192, 6, generator=torch.Generator().manual_seed(0))
    moments = feature_moments(features, torch.zeros(8192, dtype=torch.long), 2, [6])
    exact = features.double().sum(0)
    assert float((moments.targets[:6, 0] / exact - 1).abs().max()) < 3e-7


def test_a_layer_of_zeros_is_left_alone():
    features = torch.cat([torch.zeros(5, 2), torch.ones(5, 1)], dim=1)
    moments = feature_moments(features, torch.zeros(5, dtype=torch.long), 2, [2, 1])
    assert moments.scale.tolist() == [1, 1, 1, 1]
    assert moments.in_float32


def test_the_moments_of_the_first_features_are_those_of_the_features_alone():
    features, labels = problem()
    kept = feature_moments(features, labels, 4, [2, 6]).of_layers([2])
    alone = feature_moments(features[:, :2], labels, 4, [2])
    for name in ("gram", "targets", "scale"):
        torch.testing.assert_close(getattr(kept, name), getattr(alone, name))


def test_moments_are_a_plain_value():
    moments = Moments(torch.tensor([8.0, 2.0]).diag(), torch.zeros(2, 1), [1], 2)
    assert moments.scale.tolist() == [0.5, 1.0]
    assert moments.second_moment.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_moments_of_two_parts_add_up_to_those_of_the_whole():
    features, labels = problem()
    weights = torch.arange(len(features)).remainder(3).double()
    whole, first, second = (
        feature_moments(features[rows], labels[rows], 4, [5, 3], weights=weights[rows])
        for rows in (slice(None), slice(7), slice(7, None))
    )
    for found, wanted in ((first + second, whole), (whole - second, first)):
        assert found.n_train == wanted.n_train
        assert found.weight == wanted.weight
        for name in ("gram", "targets", "scale"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=1e-12)


def test_a_part_without_weight_adds_nothing():
    features, labels = problem()
    nothing = feature_moments(features, labels, 4, [5, 3], weights=torch.zeros(len(features)))
    whole = feature_moments(features, labels, 4, [5, 3])
    assert torch.equal((whole + nothing).gram, whole.gram)
    with pytest.raises(ValueError, match="`sample_weight` must be above 0 for one training example"):
        nothing.checked()


class TestRange:
    """Squares of float32 leave its range long before the features do."""

    @pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1e-13, 1e13, 1e20, 1e30, 1e37])
    @pytest.mark.parametrize("cheap", [0, 2**28])
    def test_of_one_layer_beside_another(self, monkeypatch, size, cheap):
        monkeypatch.setattr(module, "_CHEAP", cheap)
        features, labels = problem(dtype=torch.float32)
        features[:, :5] *= size
        found = feature_moments(features, labels, 4, [5, 3])
        exact = feature_moments(features.double(), labels, 4, [5, 3])
        assert not found.in_float32
        for name in ("second_moment", "scale"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-6, atol=1e-7)
        assert float(found.second_moment.diagonal()[:5].sum()) == pytest.approx(1)

    def test_ordinary_features_are_read_once_in_float32(self, monkeypatch):
        monkeypatch.setattr(module, "_CHEAP", 0)
        seen = []
        add = module.add_gram_matrix
        monkeypatch.setattr(
            module, "add_gram_matrix", lambda total, rows: seen.append(rows.dtype) or add(total, rows)
        )
        features, labels = problem(dtype=torch.float32)
        features[:, 1] *= 1e-25  # a feature that hardly ever moves, in a layer that does
        assert feature_moments(features, labels, 4, [5, 3]).in_float32
        assert seen == [torch.float32]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_features_that_are_not_finite_are_refused(self, bad, dtype):
        features = torch.ones(5, 3, dtype=dtype)
        features[4, 1] = bad
        with pytest.raises(
            ValueError, match="`train_dataset` must give finite activations; got NaN or infinity in feature 1"
        ):
            feature_moments(features, torch.zeros(5, dtype=torch.long), 2, [3]).checked()

    @pytest.mark.parametrize("size", [1e-170, 1e170])
    def test_features_whose_squares_leave_float64_are_refused(self, size):
        features, labels = problem()
        features[:, 5:] *= size
        with pytest.raises(
            ValueError, match=r"whose squares float64 can hold, .*; got smaller or larger ones in layer 1 of"
        ):
            feature_moments(features, labels, 4, [5, 3]).checked()
