"""A third kind of operators: one subclass of `Operators` and one of `FittedOperators`, and all else works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from planted import N_CLASSES, N_TRAIN
from torch import Tensor

from stride_captum import STRIDE
from stride_captum.conformance import CHECKS, run_check
from stride_captum.evaluation.comparison.shared.methods import MethodSpec, stride
from stride_captum.operators import FittedOperators, Operators, TestPoints, TrainingSet
from stride_captum.system.saved_values import saved_as


@saved_as("test.dot-products")
@dataclass(frozen=True, kw_only=True)
class DotProducts(Operators):
    """Scores that are products of features and of the gradients with the residuals at T = 1."""

    name: ClassVar[str] = "test.dot-products"

    factor: float = 1.0

    def fit(self, training: TrainingSet) -> FittedDotProducts:
        one_hot = torch.nn.functional.one_hot(training.labels, training.logits.shape[1])
        residuals = one_hot - training.logits.softmax(1)
        return FittedDotProducts(training.features, self.factor * residuals / len(training.labels))


@saved_as("test.fitted-dot-products")
@dataclass
class FittedDotProducts(FittedOperators):
    features: Tensor
    residuals: Tensor

    @property
    def n_train(self) -> int:
        return len(self.features)

    def prepare(self, points: TestPoints) -> TestPoints:
        return points

    def scores(self, prepared: TestPoints, columns: slice) -> Tensor:
        products = prepared.features @ self.features[columns].T
        return products * (prepared.gradients @ self.residuals[columns].T)


def dot_products(model, train, **options):
    return STRIDE(model, train, operators=DotProducts(), **options)


def test_scores_are_those_of_the_formula(planted):
    model, train, (x, y) = planted[0], planted[1], planted[2].tensors
    method = STRIDE(model, train, layers=["fc3:input"], operators=DotProducts(factor=2.0))
    with torch.no_grad():
        seen, z = {}, []
        hook = model.fc3.register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0]))
        for inputs in (x, train.tensors[0]):
            z.append(model(inputs))
            seen[len(z)] = seen["h"].clone()
        hook.remove()
    labels = torch.nn.functional.one_hot(train.tensors[1], N_CLASSES)
    others = z[0].masked_fill(torch.nn.functional.one_hot(y, N_CLASSES).bool(), float("-inf"))
    gradients = torch.nn.functional.one_hot(y, N_CLASSES) - others.softmax(1)
    wanted = (seen[1] @ seen[2].T) * (gradients @ (labels - z[1].softmax(1)).T) * 2 / N_TRAIN
    torch.testing.assert_close(method.influence((x, y)), wanted)


# The kernel has no norms, and its features grow with those of any one example.
@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_the_laws_hold(name):
    assert run_check(CHECKS[name], dot_products) == "pass"


def test_it_has_a_name_and_is_saved_with_its_options(planted, tmp_path):
    model, train, test = planted[0], planted[1], planted[2].tensors
    assert STRIDE(model, train, operators="test.dot-products").operators == DotProducts()
    method = STRIDE(model, train, operators=DotProducts(factor=3.0)).fit()
    assert "test.dot-products" in repr(method)
    method.save(tmp_path / "method")
    loaded = STRIDE.load(tmp_path / "method", model, train)
    assert loaded.operators == DotProducts(factor=3.0)
    assert torch.equal(loaded.influence(test), method.influence(test))


def test_what_it_does_not_offer_is_refused(planted):
    method = dot_products(*planted[:2])
    with pytest.raises(ValueError, match=r"`normalize` must be None for operators='test.dot-products'"):
        method.influence(planted[2].tensors, normalize="cosine")
    with pytest.raises(ValueError, match=r"`operators` must be ClosedForm\(\) for adding"):
        method.add_examples(planted[2])
    with pytest.raises(AttributeError, match="temperature"):
        method.fit().temperature_  # noqa: B018
    with pytest.raises(NotImplementedError, match="training examples only"):
        method.self_influence(planted[2].tensors)


def test_it_is_a_row_of_a_comparison(planted):
    spec = MethodSpec("DotProducts", stride(DotProducts))
    assert spec(*planted[:2], {"factor": 4.0}).operators == DotProducts(factor=4.0)


def test_what_is_learned_can_be_looked_at_after_fit(planted):
    method = dot_products(*planted[:2])
    for name in ("operators_", "layers_", "n_features_"):
        assert not hasattr(method, name)
        with pytest.raises(ValueError, match=f"`{name}` must be read after fit"):
            getattr(method, name)
    method.fit()
    assert isinstance(method.operators_, FittedDotProducts)
    assert method.n_features_ == method.operators_.features.shape[1] == 6 + 8 + 5
    assert bool(method.coverage_.all())
