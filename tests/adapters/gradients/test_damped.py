"""Setting the damping of a fitted method."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC


@pytest.mark.parametrize("method", [TRAK, DiagonalEKFAC, EKFAC])
class TestEach:
    def test_a_copy_keeps_its_own(self, method, planted):
        model, train, test = planted
        first = method(model, train, damping=0.5).fit()
        before = first.influence(test.tensors)
        second = copy.copy(first)
        second.damping = 0.1
        assert torch.equal(first.influence(test.tensors), before)
        same = method(model, train, damping=0.1).influence(test.tensors)
        assert torch.allclose(second.influence(test.tensors), same, rtol=1e-5, atol=0.0)

    @pytest.mark.parametrize("value", ["0.1", [1.0], True, 10**400, float("nan"), float("inf"), -1.0])
    def test_what_is_no_number_is_refused(self, method, value, planted):
        model, train, _ = planted
        with pytest.raises(ValueError, match="`damping` must be a"):
            method(model, train, damping=value)

    def test_a_number_of_numpy_is_saved(self, method, planted, tmp_path):
        model, train, test = planted
        fitted = method(model, train, damping=np.float32(0.25)).fit()
        fitted.save(tmp_path / "method")
        loaded = method.load(tmp_path / "method", model, train)
        assert loaded.damping == 0.25
        assert torch.equal(loaded.influence(test.tensors), fitted.influence(test.tensors))


@pytest.mark.parametrize("method", [TRAK, DiagonalEKFAC])
def test_none_is_refused_where_it_stands_for_nothing(method, planted):
    model, train, _ = planted
    with pytest.raises(ValueError, match="`damping` must be a"):
        method(model, train, damping=None)
