"""Damped inverses, and dampings that are too small for a precision."""

from __future__ import annotations

import pytest
import torch
from flat_options import arguments

from stride_captum import STRIDE, ClosedForm
from stride_captum.closed_form.damping import LEAST_OF_HEAD, check_damping, damped_inverse, needs_float64

DTYPES = {torch.float32: "1e-07", torch.float16: "3e-05", torch.bfloat16: "0.002"}


def test_a_damping_below_rounding_errors():
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-9]], dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"`damping` must be large enough .*got 1e-12. Raise it \(the default is 0.3\)"
    ):
        damped_inverse(matrix, 1e-12)
    assert torch.isfinite(damped_inverse(matrix, 1e-6)).all()


def test_the_damping_is_relative_to_the_mean_diagonal():
    matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert damped_inverse(matrix, 0.5).diagonal().tolist() == pytest.approx([1 / 2, 1 / 4])
    given = damped_inverse(matrix, 0.5, torch.tensor(4.0, dtype=torch.float64))
    assert given.diagonal().tolist() == pytest.approx([1 / 3, 1 / 5])


@pytest.mark.parametrize("name", ["damping", "head_damping"])
class TestRefusals:
    def fit(self, name: str, damping: float, dtype: torch.dtype, n_features: int = 5) -> STRIDE:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(40, n_features, generator=generator).to(dtype)
        logits, labels = torch.randn(40, 3, generator=generator).to(dtype), torch.arange(40) % 3
        config = arguments(**{name: damping})
        return STRIDE.from_features(features, logits, labels, **config).fit()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_rounded_features(self, name, dtype):
        kind, least = str(dtype).removeprefix("torch."), DTYPES[dtype]
        message = (
            f"`{name}` must be large enough for {kind} features, at least {least}; got {float(least) / 2:g}. "
            "Raise it, or give the model and its data in float64."
        )
        with pytest.raises(ValueError, match=message):
            self.fit(name, float(least) / 2, dtype)
        assert self.fit(name, float(least), dtype).n_train_ == 40

    def test_of_many_features_in_float64(self, name):
        with pytest.raises(
            ValueError, match=rf"`{name}` must be .* float64 features, at least 2e-09; got 1e-09. Raise it\.$"
        ):
            self.fit(name, 1e-9, torch.float64, n_features=100)
        assert self.fit(name, 1e-9, torch.float64).n_train_ == 40


def test_float32_is_enough_for_the_defaults():
    config = ClosedForm()
    for n, d in ((50_000, 1_552), (5_000, 4_096), (2_000, 3_840)):
        assert not needs_float64(config.damping, n, d)
        assert not needs_float64(config.head_damping, n, d, LEAST_OF_HEAD)
    assert needs_float64(config.damping, 100, 4_096)
    check_damping(config.damping, torch.zeros(1, 10**6, dtype=torch.bfloat16))
