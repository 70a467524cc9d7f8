from __future__ import annotations

import pytest
import torch
from flat_options import arguments
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Features, Trained
from stride_captum.closed_form.class_moments import MOST_CLASSES
from stride_captum.features.projection import fit_projection, kernel_error

CPU = torch.device("cpu")
WIDTHS = [40, 6, 30]


def low_rank(n: int = 200, rank: int = 5) -> torch.Tensor:
    """Features whose wide layers have `rank` directions."""
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(n, min(rank, w), generator=g) @ torch.randn(min(rank, w), w, generator=g) for w in WIDTHS
    ]
    return torch.cat(parts, 1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class TestKernel:
    def test_principal_directions_lose_nothing_of_a_low_rank_kernel(self):
        features = low_rank()
        pca = fit_projection(features, WIDTHS, "pca", 8, 0, CPU, block_rows=33)
        assert pca.new_widths == [8, 6, 8]
        assert pca.error < 1e-5
        h, p = features.double(), pca.whole(features, CPU, block_rows=17).double()
        torch.testing.assert_close(p @ p.T, h @ h.T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(p[:, 8:14], h[:, 40:46])  # the narrow layer is as it was

    def test_the_error_is_that_of_the_kernel_of_scaled_layers(self):
        features = torch.randn(100, sum(WIDTHS), generator=torch.Generator().manual_seed(1))
        found = fit_projection(features, WIDTHS, "random", 10, 0, CPU)
        projected = found(features)
        kernels = []
        for rows, widths in ((features, WIDTHS), (projected, found.new_widths)):
            layers = rows.double().split(widths, 1)
            kernels.append(sum(x @ x.T / x.square().sum(1).mean() for x in layers))
        assert found.error == pytest.approx(relative(kernels[1], kernels[0]), rel=1e-6)
        assert found.error > 0.1
        assert kernel_error(found, features, CPU) == found.error

    def test_the_error_of_more_examples_than_float32_can_count(self):
        n = 2**24 + 4  # the float32 next to n - 1 is n
        one = torch.randn(1, sum(WIDTHS), generator=torch.Generator().manual_seed(1))
        found = fit_projection(one.expand(30, -1), WIDTHS, "random", 10, 0, CPU)
        assert kernel_error(found, one.expand(n, -1), CPU) == pytest.approx(found.error, rel=1e-6)

    def test_the_error_falls_with_the_width_and_pca_beats_chance(self):
        features = low_rank(rank=20)
        errors = {
            kind: [fit_projection(features, WIDTHS, kind, width, 0, CPU).error for width in (4, 12)]
            for kind in ("random", "pca")
        }
        for few, many in errors.values():
            assert many < few
        assert errors["pca"][1] < errors["random"][1]

    def test_random_directions_keep_the_kernel_on_average(self):
        features = low_rank(n=20)
        wanted = features[:, :40] @ features[:, :40].T
        total = torch.zeros_like(wanted)
        for seed in range(400):
            p = fit_projection(features, WIDTHS, "random", 10, seed, CPU)(features)[:, :10]
            total += p @ p.T / 400
        assert relative(total, wanted) < 0.05

    def test_the_same_seed_gives_the_same_bits(self):
        features = low_rank()
        first, same, other = (
            fit_projection(features, WIDTHS, "random", 9, s, CPU)(features) for s in (3, 3, 4)
        )
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def classifier(width: int, n_classes: int, n: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, n_classes)).eval()
    x = torch.randn(n, 5)
    return model, TensorDataset(x, torch.arange(n) % n_classes)


class TestScores:
    @pytest.mark.slow
    @pytest.mark.parametrize("operators", ["closed-form", "trained"])
    def test_a_projection_that_loses_nothing_changes_no_score(self, tmp_path, operators):
        model, train = classifier(64, 3, 90)
        with torch.no_grad():
            model[0].weight[20:] = 0  # 20 directions and those of a constant
            model[0].bias[20:] = 1
        test = train.tensors[0][:4], train.tensors[1][:4]
        options = {"layers": ["1"], "batch_size": 16}
        projected = arguments(projection="pca", projection_width=24)
        if operators == "trained":
            few = {"operators": "trained", "n_subsets": 6, "subsets": "partition", "rank": 3, "iterations": 3}
            method = STRIDE(
                model, train, **arguments(**few, projection="pca", projection_width=24), **options
            )
            assert method.influence(test).shape == (4, 90)
        else:
            method = STRIDE(model, train, **projected, **options)
            wanted = STRIDE(model, train, **options).influence(test)
            # The mean square norm counts features, and damping is relative to it: both scale with the width.
            found = method.influence(test)
            assert relative(found, wanted) < 0.35
            ranks = torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]
            assert ranks > 0.97
        assert method.projection_error_ < 1e-5
        stored = STRIDE(
            model,
            train,
            operators=method.operators,
            features=method.features,
            feature_store=tmp_path / "s",
            **options,
        )
        assert torch.equal(stored.influence(test), method.influence(test))
        stored.save(tmp_path / "file")
        loaded = STRIDE.load(tmp_path / "file", model, train)
        assert torch.equal(loaded.influence(test), method.influence(test))
        assert loaded.projection_error_ == method.projection_error_

    def test_layers_that_fit_are_left_alone(self):
        model, train = classifier(8, 3, 30)
        test = train.tensors[0][:4], train.tensors[1][:4]
        method = STRIDE(model, train, features=Features(projection="random", projection_width=8))
        assert torch.equal(method.influence(test), STRIDE(model, train).influence(test))
        assert method.projection_error_ == 0

    def test_wrong_options(self):
        model, train = classifier(64, 3, 30)
        features = Features(select="penultimate", projection="random", projection_width=8)
        with pytest.raises(ValueError, match="`steering` must be 'logits' unless one layer is read"):
            STRIDE(model, train, operators=Trained(steering="representation"), features=features).fit()


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [1_000, 32_000])
def test_many_classes_never_meet_examples_and_features_in_one_array(n_classes):
    n, d = 60, 48
    model, train = classifier(d, n_classes, n)
    test = train.tensors[0][:3], train.tensors[1][:3]
    method = STRIDE(model, train, layers=["1"])
    with Largest() as seen:
        scores = method.influence(test)
        method.influence(test, 5, normalize="cosine")
        method.self_influence()
    assert torch.isfinite(scores).all()
    classes = n_classes**2 if n_classes <= MOST_CLASSES else 0
    assert seen.bytes <= 8 * max((d + 1) * n_classes, n * n_classes, classes) < 4 * n * d * n_classes


def test_beyond_the_bound_only_the_diagonal_of_sigma_is_kept_and_scores_hardly_move(monkeypatch):
    model, train = classifier(16, 300, 200)
    test = train.tensors[0][:5], train.tensors[1][:5]
    whole = STRIDE(model, train).influence(test)
    monkeypatch.setattr("stride_captum.closed_form.fit.MOST_CLASSES", 299)
    method = STRIDE(model, train)
    diagonal = method.influence(test)
    assert method._states[0].operators.curvature.class_side.shape == (300,)
    p = model(train.tensors[0]).detach().div(method.temperature_).softmax(1).double()
    sigma = (p - p.square()).mean(0)
    wanted = 1 / (sigma + 0.3 * sigma.sum() / 299)
    curvature = method._states[0].operators.curvature
    torch.testing.assert_close((curvature.class_side / curvature.scale).double(), wanted, rtol=1e-5, atol=0)
    assert relative(diagonal, whole) < 0.02
    method.influence(test, normalize="cosine")
