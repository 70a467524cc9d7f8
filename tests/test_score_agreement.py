"""Reliability of scores: against planted signal and noise, and against explicit halves and checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import MLP, built, planted_classes, trained
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Checkpoint, ClosedForm, Trained, reliability
from stride_captum.adapters import TRAK, Random, Similarity, TracIn
from stride_captum.influence.checkpoints.averages import weight_of_parts
from stride_captum.score_agreement import feature_halves

N = 2_000
STRENGTHS = torch.tensor([0.0, 0.5, 1.0, 4.0])


def test_checkpoints_count_by_their_weights():
    model, train, test = trained(MLP)
    draw = torch.Generator().manual_seed(0)
    states = [
        {name: v + 0.1 * i * torch.randn(v.shape, generator=draw) for name, v in model.state_dict().items()}
        for i in range(3)
    ]
    seen = [None, None, range(0, 48, 2)]
    kept = [Checkpoint(state, seen=rows) for state, rows in zip(states, seen, strict=True)]
    how = {"operators": ClosedForm(residuals="temperature", temperature=2.0)}
    found = reliability(STRIDE(model, train, checkpoints=kept, **how), test.tensors)
    each = torch.stack([STRIDE(model, train, checkpoints=[c], **how).influence(test.tensors) for c in kept])
    of_half = weight_of_parts(0.5)
    w = [(1 - of_half) / 2, (1 - of_half) / 2, of_half]
    for t in range(len(found)):
        r = np.corrcoef(each[:, t].double().numpy())
        pairs = [(w[i] * w[j], r[i, j]) for i in range(3) for j in range(3) if i != j]
        mean = sum(a * b for a, b in pairs) / sum(a for a, _ in pairs)
        k = 1 / sum(v**2 for v in w)
        assert float(found[t]) == pytest.approx(k * mean / (1 + (k - 1) * mean), abs=1e-5)


class Planted(Random):
    """Scores of checkpoint c and test point j: `7 + strength_j signal_j + noise_cj`, both of variance 1."""

    def fit_checkpoint(self, model, show_progress):
        super().fit_checkpoint(model, show_progress)
        return self._checkpoint_index

    def prepare_query(self, state, model, batch, query):
        return state

    def score_columns(self, state, prepared, columns):
        def drawn(seed):
            return torch.randn(4, N, generator=torch.Generator().manual_seed(seed))

        return (7.0 + STRENGTHS[:, None] * drawn(100) + drawn(prepared))[:, columns]


def correlation(a, b):
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])


@pytest.mark.parametrize("k", [2, 5])
def test_it_is_the_share_of_the_variance_that_is_signal(k):
    states = [built(MLP, seed).state_dict() for seed in range(k)]
    data = planted_classes(N)
    method = Planted(built(MLP), data, checkpoints=states, memory_budget=200_000)
    found = reliability(method, planted_classes(4, seed=1).tensors)
    wanted = k * STRENGTHS**2 / (k * STRENGTHS**2 + 1)
    torch.testing.assert_close(found, wanted.double(), atol=0.06, rtol=0)
    assert found.min() >= 0


@pytest.mark.parametrize("cls", [STRIDE, TRAK, TracIn])
def test_checkpoints_are_compared_as_they_score(cls):
    states = [built(MLP, seed).state_dict() for seed in (1, 2, 3)]
    data, test = planted_classes(40), planted_classes(6, seed=9).tensors
    options = {"operators": ClosedForm(residuals="temperature", temperature=2)} if cls is STRIDE else {}
    scores = [cls(built(MLP), data, checkpoints=[s], **options).influence(test) for s in states]
    r = sum(correlation(scores[a], scores[b]) for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    found = reliability(cls(built(MLP), data, checkpoints=states, **options), test)
    np.testing.assert_allclose(found.numpy(), np.clip(3 * r / (1 + 2 * r), 0, 1), rtol=1e-4, atol=1e-6)


def test_one_checkpoint_is_compared_by_halves_of_its_features():
    model, train, test = trained(MLP)
    method = STRIDE(model, train).fit()
    operators, batch = method.operators_, test.tensors
    rows = method._read_batch(model, method._states[0].taps, method._example_batch(batch, "x"))
    features, logits = rows.side_by_side, rows.logits
    r = np.zeros(len(batch[1]))
    for split in range(2):
        scores = []
        for columns, widths in zip(*feature_halves(operators.widths, 5 + split), strict=True):
            half = STRIDE.from_features(
                operators.features[:, columns],
                operators.logits,
                operators.labels,
                widths=widths,
                operators=ClosedForm(temperature=operators.temperature),
            )
            scores.append(half.influence((features[:, columns].detach(), logits.detach(), batch[1])))
        r += correlation(*scores) / 2
    wanted = np.clip(2 * r / (1 + r), 0, 1)
    found = reliability(method, batch, n_splits=2, seed=5).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_features_without_structure_are_less_reliable_than_planted_ones():
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 4
    means = 2 * torch.randn(4, 40, generator=rng)
    noise = torch.randn(200, 40, generator=rng)
    found = {}
    for name, features in (("planted", means[y] + noise), ("noise", noise)):
        logits = features @ (0.1 * torch.randn(40, 4, generator=rng))
        method = STRIDE.from_features(features[:150], logits[:150], y[:150])
        inputs = (features[150:], logits[150:], y[150:])
        found[name] = reliability(method, inputs, response="loss").mean()
    assert found["planted"] > found["noise"] + 0.1


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e5 / 7])
def test_constant_scores_have_none(value):
    class Constant(Similarity):
        def score_columns(self, state, prepared, columns):
            return torch.full((3, columns.stop - columns.start), value, dtype=torch.float64)

    states = [built(MLP, seed).state_dict() for seed in (1, 2)]
    method = Constant(built(MLP), planted_classes(30), checkpoints=states)
    assert reliability(method, planted_classes(3, seed=1).tensors).isnan().all()


def test_halves_of_features_share_layers_of_one_feature_alone():
    columns, widths = feature_halves([5, 1, 2], seed=3)
    assert widths == [[2, 1, 1], [3, 1, 1]]
    assert set(columns[0].tolist()) & set(columns[1].tolist()) == {5}
    assert set(columns[0].tolist()) | set(columns[1].tolist()) == set(range(8))
    assert all((part.diff() > 0).all() for part in columns)


@pytest.mark.parametrize("method", [Similarity, lambda *a: STRIDE(*a, operators=Trained(iterations=2))])
def test_one_checkpoint_of_another_method_is_refused(method):
    data = planted_classes(30)
    with pytest.raises(ValueError, match="have several checkpoints, or closed-form operators"):
        reliability(method(built(MLP), data), data[:3])


def test_the_class_and_the_response_are_those_that_are_asked_for():
    states = [built(MLP, seed).state_dict() for seed in (1, 2)]
    method = STRIDE(built(MLP), planted_classes(40), checkpoints=states)
    x, y = planted_classes(6, seed=9).tensors
    asked = reliability(method, (x, y), target=2, response="logit")
    wanted = reliability(method, TensorDataset(x, torch.full_like(y, 2)), response="logit")
    torch.testing.assert_close(asked, wanted)
    assert not torch.allclose(asked, reliability(method, (x, y)))
