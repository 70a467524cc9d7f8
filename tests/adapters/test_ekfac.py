from __future__ import annotations

import gc
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import (
    MLP,
    BatchNormCNN,
    HuggingFaceLike,
    ListOfDicts,
    TwoInputs,
    built,
    examples,
    planted_classes,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import Batch
from stride_captum.adapters.controls import input_keys
from stride_captum.adapters.ekfac import EKFAC
from stride_captum.conformance import invariance_checks, score_checks, usage_checks
from stride_captum.losses import CrossEntropy
from stride_captum.residuals import drawn_labels, tempered_residuals
from stride_captum.responses import response_gradient

pytest.importorskip("kronfluence")

N_TRAIN, N_TEST = 30, 5


def doubled(n: int, shape: tuple[int, ...] = (6,), seed: int = 0) -> TensorDataset:
    x, y = planted_classes(n, shape, seed).tensors
    return TensorDataset(x.double(), y)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A network of two layers in float64, not trained."""
    network = built(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), seed=3)
    return network.double().eval(), doubled(N_TRAIN, seed=1), doubled(N_TEST, seed=2)


# The reference: everything explicit, one example at a time.


def gradients_of(model: nn.Module, layers: list[str], x: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """`J_i^T v_i` of each layer with the bias as its last column, `(n, n_out, n_in + 1)`."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for one, vector in zip(x, vectors, strict=True):
        response = (model(one[None])[0] * vector).sum()
        for layer in layers:
            module = model.get_submodule(layer)
            weight, bias = torch.autograd.grad(response, [module.weight, module.bias], retain_graph=True)
            found[layer].append(torch.cat([weight.flatten(1), bias[:, None]], 1))
    return {layer: torch.stack(rows) for layer, rows in found.items()}


def residuals_of(model: nn.Module, data: TensorDataset) -> Tensor:
    x, y = data.tensors
    return torch.nn.functional.one_hot(y, 3) - model(x).detach().softmax(1)


def drawn_residuals(model: nn.Module, data: TensorDataset, draw: int) -> Tensor:
    """Residuals of labels that the model draws for every example."""
    x, _ = data.tensors
    p, labels = model(x).detach().softmax(1), []
    for key, row in zip(input_keys(examples(data.tensors)), p, strict=True):
        u = np.random.default_rng([0, draw, key]).random()
        labels.append(int(np.searchsorted(np.cumsum(row.numpy()), u, side="right")))
    assert len(set(labels)) > 1
    return torch.nn.functional.one_hot(torch.tensor(labels), 3) - p


def inverse_fisher(
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    strategy: str,
    damping: float | None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """`(F + lambda I)^-1` of each layer, a matrix over its flattened gradient.

    Args:
        first: Gradients that Q is made of.
        second: Gradients that Lambda is made of.
        strategy: As for `EKFAC`.
        damping: As for `EKFAC`.
        weights: Of the examples in all means; None for 1.
    """
    found = {}
    share = torch.ones(N_TRAIN).double() if weights is None else weights
    share = (share / share.sum())[:, None]
    for layer, g in first.items():
        # For one position an example, the gradient is b a^T with 1 as the last entry of a.
        b = g[:, :, -1]
        a = torch.stack([(b_i @ g_i) / (b_i @ b_i) for b_i, g_i in zip(b, g, strict=True)])
        value_a, q_a = torch.linalg.eigh(a.T @ (a * share))
        value_b, q_b = torch.linalg.eigh(b.T @ (b * share))
        q, values = torch.kron(q_b, q_a), torch.kron(value_b, value_a)
        if strategy == "ekfac":
            values = ((second[layer].flatten(1) @ q).square() * share).sum(0)
        if strategy == "diagonal":
            q, values = torch.eye(len(q)).to(q), (second[layer].flatten(1).square() * share).sum(0)
        if strategy == "identity":
            q, values, damping = torch.eye(len(q)).to(q), torch.ones(len(q)).to(q), 0.0
        extra = 0.1 * values.mean() if damping is None else damping
        found[layer] = q @ torch.diag(1 / (values + extra)) @ q.T
    return found


def product(left: dict[str, Tensor], inverse: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """`left^T M right / N` over all pairs."""
    parts = [left[layer].flatten(1) @ inverse[layer] @ right[layer].flatten(1).T for layer in left]
    return sum(parts) / N_TRAIN


LAYERS = ["0", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("damping", [None, 1e-2])
def test_scores_are_those_of_an_explicit_ekfac(small, strategy, fisher, damping) -> None:
    model, train, test = small
    x, (u, v) = train.tensors[0], test.tensors
    method = EKFAC(model, train, damping=damping, strategy=strategy, fisher=fisher, batch_size=7)
    r = residuals_of(model, train)
    rows = [r, r] if fisher == "empirical" else [drawn_residuals(model, train, draw) for draw in (0, 1)]
    first, second = (gradients_of(model, LAYERS, x, row) for row in rows)
    inverse = inverse_fisher(first, second, strategy, damping)
    right = gradients_of(model, LAYERS, x, r)
    for response in ("margin", "loss"):
        g = response_gradient(model(u).detach(), v, response)
        left = gradients_of(model, LAYERS, u, g)
        wanted = product(left, inverse, right)
        found = method.influence((u, v), response=response)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    own = product(right, inverse, right).diagonal()
    torch.testing.assert_close(method.self_influence(), own, rtol=1e-7, atol=0)
    others = product(left, inverse, left).diagonal()
    cosine = wanted / others.sqrt()[:, None] / own.sqrt()
    torch.testing.assert_close(method.influence((u, v), response="loss", normalize="cosine"), cosine)
    torch.testing.assert_close(method.self_influence((u, v)), others)


WEIGHTS = torch.tensor([0.0, 0.5, 2.0, 1.0, 7.0, 0.1]).double().repeat(5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("damping", [None, 1e-2])
def test_weights_are_in_every_mean_once_and_in_the_score_once(small, strategy, fisher, damping) -> None:
    model, train, test = small
    x, (u, v) = train.tensors[0], test.tensors
    options = {"damping": damping, "strategy": strategy, "fisher": fisher, "batch_size": 7}
    method = EKFAC(model, train, batch=Batch(sample_weight=WEIGHTS), **options)
    r = residuals_of(model, train)
    rows = [r, r] if fisher == "empirical" else [drawn_residuals(model, train, draw) for draw in (0, 1)]
    first, second = (gradients_of(model, LAYERS, x, row) for row in rows)
    inverse = inverse_fisher(first, second, strategy, damping, WEIGHTS)
    left = gradients_of(model, LAYERS, u, response_gradient(model(u).detach(), v, "margin"))
    right = gradients_of(model, LAYERS, x, r)
    mean = WEIGHTS.mean()  # the factor is 1 over the sum of the weights
    wanted = product(left, inverse, right) * WEIGHTS / mean
    found = method.influence((u, v))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    own = product(right, inverse, right).diagonal()
    torch.testing.assert_close(method.self_influence(), own * WEIGHTS / mean, rtol=1e-7, atol=0)
    others, safe = product(left, inverse, left).diagonal(), own.where(WEIGHTS > 0, 1.0)
    cosine = product(left, inverse, right) / others.sqrt()[:, None] / safe.sqrt() * (WEIGHTS > 0)
    torch.testing.assert_close(method.influence((u, v), normalize="cosine"), cosine)


def test_class_weights_are_weights_of_examples(small) -> None:
    model, train, test = small
    weight = torch.tensor([0.5, 3.0, 1.0]).double()
    of_classes = EKFAC(model, train, loss=CrossEntropy(weight=weight))
    of_examples = EKFAC(model, train, batch=Batch(sample_weight=weight[train.tensors[1]]))
    assert torch.equal(of_classes.influence(test.tensors), of_examples.influence(test.tensors))
    thrice = EKFAC(model, train, loss=CrossEntropy(weight=3 * weight))
    torch.testing.assert_close(thrice.influence(test.tensors), of_classes.influence(test.tensors))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "grouped", "alone"])
@pytest.mark.parametrize("strategy", ["ekfac", "kfac"])
def test_a_weight_of_n_is_n_copies_in_every_layout(strategy, layout) -> None:
    """Of convolutions, and of Linear layers with several rows an example."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.last = nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).flatten(2).transpose(1, 2)  # (n, 4, 3)
            if layout == "grouped":
                h = torch.tanh(self.first(h.flatten(0, 1))).reshape(len(x), 4, -1)
            elif layout == "alone":
                h = torch.tanh(self.first(h.transpose(0, 1).flatten(0, 1)))
                h = h.reshape(4, len(x), -1).transpose(0, 1)
            else:
                h = torch.tanh(self.first(h))
            found: Tensor = self.last(h.mean(1))
            return found

    model, data = built(Rows).double().eval(), doubled(8, (2, 4, 4))
    x, y = data.tensors
    copies = torch.tensor([1, 2, 0, 1, 3, 1, 1, 2])
    rows = torch.arange(8).repeat_interleave(copies)
    weighed = EKFAC(model, data, strategy=strategy, batch_size=3, batch=Batch(sample_weight=copies.double()))
    repeated = EKFAC(model, TensorDataset(x[rows], y[rows]), strategy=strategy, batch_size=3)
    found, copied = weighed.influence((x, y)), repeated.influence((x, y))
    assert (weighed.layout_, repeated.layout_) == (layout, layout)
    wanted = torch.zeros_like(found).index_add_(1, rows, copied)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


def test_weights_of_0_alone_are_refused(small) -> None:
    model, train, _ = small
    with pytest.raises(
        ValueError, match=r"`train_dataset` must have at least one label .* with a weight above 0"
    ):
        EKFAC(model, train, batch=Batch(sample_weight=torch.zeros(N_TRAIN))).fit()


@pytest.mark.parametrize("damping", [None, 1e-3])
def test_scores_follow_from_the_stored_factors(small, damping) -> None:
    model, train, test = small
    method = EKFAC(model, train, damping=damping)
    scores = method.influence(test.tensors)
    kernel = method._states[0].kernel
    wanted = torch.zeros_like(scores)
    margins = response_gradient(model(test.tensors[0]).detach(), test.tensors[1], "margin")
    right = gradients_of(model, LAYERS, train.tensors[0], residuals_of(model, train))
    left = gradients_of(model, LAYERS, test.tensors[0], margins)
    for layer in LAYERS:
        q_b, q_a = (kernel[f"{side}_eigenvectors"][f"0.{layer}"] for side in ("gradient", "activation"))
        mean = kernel["lambda_matrix"][f"0.{layer}"] / N_TRAIN
        inverse = 1 / (mean + (0.1 * mean.mean() if damping is None else damping))
        rotated = [q_b.T @ side[layer] @ q_a for side in (left, right)]
        wanted += torch.einsum("qoi,oi,boi->qb", rotated[0], inverse, rotated[1]) / N_TRAIN
    torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_damping_is_set_anew_without_another_fit(small, normalize) -> None:
    model, train, test = small
    method = EKFAC(model, train)
    before = method.influence(test.tensors, normalize=normalize)
    kernel = method._states[0].kernel
    method.damping = 1e-3
    found = method.influence(test.tensors, normalize=normalize)
    assert method._states[0].kernel is kernel
    assert not torch.allclose(found, before)
    wanted = EKFAC(model, train, damping=1e-3).influence(test.tensors, normalize=normalize)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="`damping` must be a number of at least 0"):
        method.damping = -1.0


@pytest.mark.parametrize("residuals", ["temperature", "leave-one-out", "both"])
def test_out_of_sample_residuals_stand_on_the_training_side_only(small, residuals) -> None:
    model, train, test = small
    published = EKFAC(model, train).fit()
    method = EKFAC(model, train, residuals=residuals).fit()
    assert method._states[0].kernel.keys() == published._states[0].kernel.keys()
    for kind, factors in method._states[0].kernel.items():
        for layer, factor in factors.items():
            assert torch.equal(factor, published._states[0].kernel[kind][layer])
    identity = EKFAC(model, train, residuals=residuals, strategy="identity")
    found = identity.influence(test.tensors)
    r = identity._states[0].residuals
    assert not torch.allclose(r, residuals_of(model, train), atol=1e-3)
    margins = response_gradient(model(test.tensors[0]).detach(), test.tensors[1], "margin")
    left, right = (
        gradients_of(model, LAYERS, *side) for side in ((test.tensors[0], margins), (train.tensors[0], r))
    )
    alone = {layer: torch.eye(g[0].numel()).double() for layer, g in right.items()}
    torch.testing.assert_close(found, product(left, alone, right))
    loss = gradients_of(model, LAYERS, train.tensors[0], residuals_of(model, train))
    own = product(loss, alone, right).diagonal()
    torch.testing.assert_close(identity.self_influence(), own)


def flat_gradients(method: EKFAC, model: nn.Module, batch, vectors: Tensor) -> Tensor:
    gradients = method._gradients(model, examples(batch), vectors)
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


@pytest.mark.parametrize("build", [BatchNormCNN, TwoInputs, HuggingFaceLike])
def test_every_parameter_that_takes_part_counts_once(build) -> None:
    model = built(build).double().eval()
    if build is HuggingFaceLike:
        train = ListOfDicts(12)
        train.attention_mask = train.attention_mask.double()
        batch, y = train[:], train.labels
        outputs = model(batch["input_ids"], batch["attention_mask"]).logits
    else:
        x, y = doubled(12, build.shape).tensors
        inputs = (x, x.flip(1)) if build is TwoInputs else (x,)
        train, batch = TensorDataset(*inputs, y), (*inputs, y)
        outputs = model(*inputs)
    for strategy in ("identity", "diagonal"):
        method = EKFAC(model, train, strategy=strategy, fisher="empirical", damping=1e-3, batch_size=5)
        scores = method.influence(batch, response="log-probability")
        g = flat_gradients(method, model, batch, tempered_residuals(outputs.detach(), y))
        weights = torch.ones(g.shape[1]).to(g)
        if strategy == "diagonal":
            weights = 1 / (g.square().mean(0) + 1e-3)
        torch.testing.assert_close(scores, (g * weights) @ g.T / len(y))
    left_out = {"bn1.weight", "bn1.bias", "embedding.weight"}
    assert set(method.parameters_) == {name for name, _ in model.named_parameters()} - left_out


def test_layers_and_frozen_weights_choose_what_takes_part() -> None:
    model, train, _ = trained(MLP)
    assert EKFAC(model, train, layers=["fc2"]).fit().parameters_ == ["fc2.weight", "fc2.bias"]
    model.fc1.weight.requires_grad_(False)
    model.fc2.bias.requires_grad_(False)
    wanted = ["fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"]
    assert EKFAC(model, train).fit().parameters_ == wanted


def test_a_layer_alone_is_a_model() -> None:
    train = doubled(12)
    method = EKFAC(built(lambda: nn.Linear(6, 3)).double(), train, strategy="identity")
    x, y = train.tensors
    r = residuals_of(method.model, train)
    with_bias = torch.cat([x, torch.ones(12, 1).double()], 1)
    wanted = (r @ r.T) * (with_bias @ with_bias.T) / 12
    torch.testing.assert_close(method.influence((x, y), response="log-probability"), wanted)


# The labels that the model draws.


def test_drawn_labels_have_the_frequencies_of_the_model() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(9_000, 3)
    labels = drawn_labels(logits, (torch.arange(9_000) + 0.5) / 9_000)
    found = torch.bincount(labels, minlength=3) / 9_000
    torch.testing.assert_close(found, logits[0].softmax(0), rtol=0, atol=1 / 9_000)
    assert drawn_labels(torch.zeros(1, 3), torch.tensor([1.0])).tolist() == [2]


def test_the_seed_chooses_the_labels(small) -> None:
    model, train, _ = small
    first, again, other = (EKFAC(model, train, seed=seed).fit()._states[0].kernel for seed in (0, 0, 1))
    for kind in ("gradient_eigenvalues", "lambda_matrix"):
        assert torch.equal(first[kind]["0.2"], again[kind]["0.2"])
        assert not torch.allclose(first[kind]["0.2"], other[kind]["0.2"], rtol=1e-3)
    activations = "activation_eigenvalues"
    assert torch.equal(first[activations]["0.2"], other[activations]["0.2"])


# Laws and traces.


@pytest.mark.slow
@pytest.mark.parametrize(
    "law",
    [
        invariance_checks.permuting_the_training_set_permutes_the_columns,
        invariance_checks.the_batch_size_changes_rounding_only,
        invariance_checks.a_saved_method_gives_the_same_bits,
        invariance_checks.the_grad_mode_of_the_caller_changes_nothing,
        score_checks.examples_of_the_class_raise_its_margin,
        score_checks.self_influence_is_minus_the_effect_on_the_own_loss,
        score_checks.checkpoints_are_averaged,
        usage_checks.nan_in_a_test_point_is_never_hidden,
        usage_checks.the_model_is_left_as_it_was,
        usage_checks.the_model_is_left_as_it_was_after_an_exception,
    ],
    ids=lambda law: law.__name__,
)
def test_laws(law) -> None:
    law(EKFAC)


def test_the_law_of_self_influence_holds_with_out_of_sample_residuals() -> None:
    law = score_checks.self_influence_is_minus_the_effect_on_the_own_loss
    law(partial(EKFAC, residuals="both"))


def test_nothing_is_left_behind_and_nothing_is_said(tmp_path, monkeypatch, capfd, caplog) -> None:
    from kronfluence.utils.state import State

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared, frozen = dict(State._shared_state), gc.get_freeze_count()
    model, train, test = trained(MLP)
    method = EKFAC(model, train)
    method.influence(test.tensors, normalize="cosine")
    method.self_influence()
    assert list(Path(tmp_path).iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert State._shared_state == shared
    assert gc.get_freeze_count() == frozen


@pytest.mark.slow
def test_what_the_caller_has_frozen_stays_frozen(small) -> None:
    model, train, test = small
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        EKFAC(model, train).influence(test.tensors)
        assert 0 < gc.get_freeze_count() <= frozen  # some may have died
    finally:
        gc.unfreeze()


def test_progress_is_shown_on_request(small, capfd) -> None:
    model, train, _ = small
    EKFAC(model, train).fit(show_progress=True)
    assert "fitting EKFAC" in capfd.readouterr().err


# What is refused.


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (
            {"damping": -1.0},
            "`damping` must be a number of at least 0, or None for a tenth of the mean eigenvalue",
        ),
        ({"damping": float("nan")}, "`damping` must be a number of at least 0"),
        ({"damping": "x"}, "or None for a tenth of the mean eigenvalue; got 'x'"),
        ({"strategy": "ekfca"}, "`strategy` must be one of .* Nearest: 'ekfac'"),
        ({"fisher": "true"}, "`fisher` must be one of 'sampled', 'empirical'; got 'true'"),
        ({"seed": -1}, "`seed` must be an integer of at least 0; got -1"),
        ({"seed": 0.5}, "`seed` must be an integer"),
    ],
)
def test_options_out_of_range_are_refused(small, option, match) -> None:
    with pytest.raises(ValueError, match=match):
        EKFAC(small[0], small[1], **option)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(x).relu()))


def test_a_layer_that_is_called_twice_is_refused() -> None:
    model = built(Twice).double()
    with pytest.raises(ValueError, match="call each layer once for EKFAC; got 2 calls of 'inner'"):
        EKFAC(model, doubled(8)).fit()
    assert EKFAC(model, doubled(8), layers=["head"]).fit().parameters_ == ["head.weight", "head.bias"]


# Rows that layers see.


class Bags(nn.Module):
    """Five rows an example, shown to the first layer in some layout."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.first, self.last, self.layout = nn.Linear(6, 5), nn.Linear(5, 3), layout
        if layout == "a learned query":
            self.query = nn.Parameter(torch.linspace(-1, 1, 12).reshape(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        if self.layout == "flat":
            h = self.first(x.flatten(0, 1)).unflatten(0, (n, -1))
        elif self.layout == "rows first":
            h = self.first(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "rows first and flat":
            h = self.first(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, n)).transpose(0, 1)
        elif self.layout == "a learned query":
            h = x[:, :2, :5] * self.first(self.query)
        elif self.layout == "called by name":
            h = self.first(input=x)
        else:
            h = self.first(x)
        # The width of a layer that is wrapped is still there.
        return self.last(h.relu().mean(1) * self.first.weight.shape[1] / self.last.in_features)


def bags(layout: str) -> nn.Module:
    return built(lambda: Bags(layout)).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "found"), [("flat", "grouped"), ("rows first", "alone"), ("rows first and flat", "alone")]
)
@pytest.mark.parametrize("rows", [5, 3])
def test_scores_do_not_depend_on_how_a_layer_sees_the_rows_of_an_example(
    layout, found, rows, tmp_path
) -> None:
    train, test = doubled(12, (rows, 6), seed=1), doubled(3, (rows, 6), seed=2)
    plain = EKFAC(bags("kept"), train, batch_size=5)
    method = EKFAC(bags(layout), train, batch_size=5)
    for normalize in (None, "cosine"):
        wanted = plain.influence(test.tensors, normalize=normalize)
        torch.testing.assert_close(method.influence(test.tensors, normalize=normalize), wanted)
    torch.testing.assert_close(method.self_influence(), plain.self_influence())
    assert (method.layout_, plain.layout_) == (found, "rows")
    method.save(tmp_path / "ekfac")
    loaded = EKFAC.load(tmp_path / "ekfac", method.model, train)
    assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))


def test_the_first_layer_alone_gives_one_row_a_test_point() -> None:
    train, test = doubled(12, (5, 6), seed=1), doubled(3, (5, 6), seed=2)
    found, wanted = (
        EKFAC(bags(layout), train, layers=["first"]).influence(test.tensors) for layout in ("flat", "kept")
    )
    assert found.shape == (3, 12)
    torch.testing.assert_close(found, wanted)


def test_a_layer_that_reads_what_all_examples_share_is_right_where_they_are_alone() -> None:
    train, test = doubled(12, (5, 6), seed=1), doubled(3, (5, 6), seed=2)
    method = EKFAC(bags("a learned query"), train, strategy="identity")
    found = method.influence(test.tensors, response="log-probability")
    assert method.layout_ == "alone"
    x, (u, v) = train.tensors[0], test.tensors
    left, right = (
        gradients_of(
            method.model, ["first", "last"], inputs, residuals_of(method.model, TensorDataset(inputs, y))
        )
        for inputs, y in ((u, v), train.tensors)
    )
    wanted = sum(left[name].flatten(1) @ right[name].flatten(1).T for name in left) / len(x)
    torch.testing.assert_close(found, wanted)


def test_a_layer_that_kronfluence_gets_wrong_is_refused_by_name() -> None:
    layout = "called by name"
    train, test = doubled(12, (5, 6), seed=1), doubled(3, (5, 6), seed=2)
    with pytest.raises(ValueError, match=r"`model` must use a layer on rows .* got 'first', whose"):
        EKFAC(bags(layout), train).fit()
    assert EKFAC(bags(layout), train, layers=["last"]).influence(test.tensors).shape == (3, 12)


def test_a_convolution_on_flattened_images_is_refused_by_name() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x.flatten(0, 1)).mean((2, 3)).unflatten(0, (len(x), -1))
            return self.last(h.mean(1))

    with pytest.raises(
        ValueError, match=r"`model` must use a layer .* got 'conv', whose gradients .*`layers`"
    ):
        EKFAC(built(Frames).double(), doubled(8, (4, 2, 5, 5))).fit()


class Aliases(nn.Module):
    """A layer that is called by its second name, and one that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.spare = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(6, 2)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        self.spare(x)
        return self.last(self.again(x).relu())


def test_a_layer_with_two_names_and_one_without_effect() -> None:
    class Plain(Aliases):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    train, test = doubled(12, seed=1), doubled(3, seed=2)
    found, wanted = (EKFAC(built(build).double(), train) for build in (Aliases, Plain))
    torch.testing.assert_close(found.influence(test.tensors), wanted.influence(test.tensors))
    assert found.parameters_ == ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert found.layout_ == "rows"


def test_weights_that_two_modules_share_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu())

    model = built(Tied).double()
    with pytest.raises(
        ValueError, match="`model` must have no shared weights for EKFAC; got one of 'a' and 'b'"
    ):
        EKFAC(model, doubled(8)).fit()
    assert EKFAC(model, doubled(8), layers=["head"]).fit().parameters_ == ["head.weight", "head.bias"]


def test_a_weight_that_is_used_a_second_time_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(x).relu() @ self.fc.weight)

    with pytest.raises(ValueError, match="and its weight nowhere else, for EKFAC; got 'fc'"):
        EKFAC(built(Twice).double(), doubled(8)).fit()


def test_gradients_that_are_not_finite_are_refused_with_the_example() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.head(h) + h.norm(dim=1, keepdim=True).sqrt() * torch.tensor([1.0, 0.0, 0.0])

    x, y = doubled(12).tensors
    for at in (1, 7):
        spoilt = x.clone()
        spoilt[at] = 0
        with pytest.raises(ValueError, match=f"finite gradients; got NaN or infinity for example {at}"):
            EKFAC(built(Norms).double(), TensorDataset(spoilt, y), batch_size=5).fit()


def test_a_model_without_layers_that_kronfluence_knows_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.BatchNorm1d(4)).double()
    with pytest.raises(ValueError, match="have Linear or Conv2d layers with chosen weights for EKFAC"):
        EKFAC(model, doubled(8, (2, 3, 3))).fit()


def test_without_kronfluence_the_error_says_what_to_install(small, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    with pytest.raises(ImportError, match=r'pip install "kronfluence>=\S+"'):
        EKFAC(small[0], small[1])


@pytest.mark.slow
def test_the_module_imports_without_kronfluence() -> None:
    code = "import sys; sys.modules['kronfluence'] = None; import stride_captum.adapters.ekfac"
    subprocess.run([sys.executable, "-c", code], check=True)
