"""Stage 1: what a step computes, how it scales, that it is reproducible, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stride_captum import Partition, Trained
from stride_captum.steering.gradient import BatchGradient, block_bytes, largest_block
from stride_captum.steering.objective import fidelity, stability, subset_responses
from stride_captum.steering.operators import SteeringOperators
from stride_captum.steering.rows import ExampleRows
from stride_captum.steering.sampling import SubsetRows
from stride_captum.steering.training import StageOne, step_size, train_operators
from stride_captum.subsets import (
    Membership,
    members,
    membership_from_indices,
    partition,
    random_subsets,
    sketch,
    sketch_projection,
)

N, D, N_CLASSES = 60, 6, 3


class Data:
    """A linear head on Gaussian features; labels follow the logits except for every sixth example."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        source = torch.Generator().manual_seed(0)
        self.features = torch.randn(N, D, generator=source, dtype=dtype)
        self.head = nn.utils.skip_init(nn.Linear, D, N_CLASSES, dtype=dtype)
        with torch.no_grad():
            self.head.weight.normal_(generator=source)
            self.head.bias.normal_(generator=source)
            self.logits = self.head(self.features)
        self.labels = self.logits.argmax(1)
        self.labels[::6] = (self.labels[::6] + 1) % N_CLASSES

    def train(self, membership: Membership, **options: Any) -> StageOne:
        names = ("seed", "device", "show_progress", "head", "memory_budget")
        arguments = {k: options.pop(k) for k in names if k in options}
        preset: dict[str, Any] = {"rank": 4, "iterations": 20, "batch_size": 8}
        wanted = Trained(**{**preset, **options})
        return train_operators(self.features, self.logits, self.labels, membership, wanted, **arguments)


@pytest.fixture
def data() -> Data:
    return Data()


EVERY_FORM = [(e, s) for e in ("shared", "per-subset") for s in ("logits", "representation")]


@pytest.mark.parametrize("reading", ["example", "subset"])
@pytest.mark.parametrize(("encoder", "steering"), EVERY_FORM)
def test_a_step_is_the_gradient_of_equation_5_one_subset_at_a_time(encoder, steering, reading):
    data = Data(torch.float64)
    membership = membership_from_indices([[0, 6, 12], range(1, 30), [59], range(10, 20)], N)
    head = data.head if steering == "representation" else None
    config = Trained(
        rank=4, batch_size=100, encoder=encoder, steering=steering, linearity=reading,
        fidelity_weight=0.5, stability_weight=2.0, linearity_weight=3.0, weight_decay=0.1,
    )  # fmt: skip
    operators = SteeringOperators(
        D, N_CLASSES, 4, 4, encoder=encoder, steering=steering,
        head_weight=None if head is None else head.weight, dtype=torch.float64,
    )  # fmt: skip
    rows = ExampleRows(data.features, data.logits, data.labels)
    gradient_of_batch = BatchGradient(operators, rows, membership, config, 3, 1)
    assert len(gradient_of_batch.blocks) == 4
    with torch.no_grad():
        operators.steering_matrices.normal_(generator=torch.Generator().manual_seed(1))
    for parameter in operators.parameters():
        parameter.grad = torch.zeros_like(parameter)
    losses = gradient_of_batch.accumulate()

    shift = operators.shift(data.features)
    fid, stab, lin, responses = [], [], [], []
    eye = torch.eye(64, dtype=torch.float64)
    for k in range(4):
        inside = torch.from_numpy(members(membership, k))
        outside = torch.tensor([i for i in range(N) if i not in set(inside.tolist())])
        fid.append(fidelity(data.logits[inside], shift[k, inside], data.labels[inside]))
        stab.append(stability(data.logits[outside], shift[k, outside]))
        responses.append(subset_responses(shift[k, inside]))
        x, y = sketch_projection(N, 64, 3)[inside], shift[k, inside].amax(-1)
        lin.append((x @ torch.linalg.inv(x.T @ x + eye) @ x.T @ y - y).square().sum())
    if reading == "subset":
        x, y = sketch(membership, N, 64, 3), torch.stack(responses)
        lin = [(x @ torch.linalg.inv(x.T @ x + eye) @ x.T @ y - y).square().sum()]
    a = operators.steering_matrices
    total = 0.5 * sum(fid) + 2 * sum(stab) + 3 * sum(lin) + 0.05 * a.square().sum()
    expected = torch.autograd.grad(total, list(operators.parameters()))
    for parameter, gradient in zip(operators.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    slow = [sum(fid) / 4, sum(stab) / 4, sum(lin) / len(lin)]
    torch.testing.assert_close(losses, torch.stack([v.detach() for v in slow]))


def calls_of_the_encoder(monkeypatch: pytest.MonkeyPatch, data: Data, n_subsets: int, **options: Any) -> int:
    calls = []
    encode = SteeringOperators.encode

    def counted(self: SteeringOperators, features: Tensor) -> Tensor:
        calls.append(features.shape)
        return encode(self, features)

    with monkeypatch.context() as patch:
        patch.setattr(SteeringOperators, "encode", counted)
        data.train(random_subsets(N, n_subsets, 10), iterations=3, **options)
    if options.get("encoder") != "per-subset":
        assert all(shape[0] <= N for shape in calls)
    return len(calls)


@pytest.mark.parametrize("encoder", ["shared", "per-subset"])
def test_one_call_of_the_encoder_a_step_however_many_subsets(monkeypatch, data, encoder):
    for n_subsets in (1, 7, 50):
        assert calls_of_the_encoder(monkeypatch, data, n_subsets, encoder=encoder) == 3


def test_the_memory_budget_decides_the_blocks_and_not_the_result(data):
    membership = random_subsets(N, 9, 10)
    options: dict[str, Any] = {"linearity_weight": 1.0, "iterations": 10}
    whole = data.train(membership, **options)
    blocks = data.train(membership, memory_budget=1, **options)
    for name, parameter in whole.operators.named_parameters():
        torch.testing.assert_close(blocks.operators.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)
    for name, losses in whole.history.items():
        torch.testing.assert_close(blocks.history[name], losses, rtol=1e-4, atol=1e-6)


def test_largest_block_is_the_largest_that_fits():
    operators = SteeringOperators(D, N_CLASSES, 40, 4)
    for n_subsets in (1, 7, 40):
        exact = block_bytes(operators, n_subsets, N, 8)
        assert largest_block(operators, N, 8, exact) == n_subsets
        assert largest_block(operators, N, 8, exact - 1) == max(n_subsets - 1, 1)


def test_batches_within_and_outside_a_subset_have_draws_of_their_own(data, monkeypatch):
    drawn = {"draw_members": [], "draw_outsiders": []}
    for name, seen in drawn.items():
        draw = getattr(SubsetRows, name)

        def watched(rows, block, width, uniforms, draw=draw, seen=seen):
            seen.append(uniforms.clone())
            return draw(rows, block, width, uniforms)

        monkeypatch.setattr(SubsetRows, name, watched)
    data.train(random_subsets(N, 5, 10), iterations=6)
    every = [*drawn["draw_members"], *drawn["draw_outsiders"]]
    assert len(every) == 12
    for i, one in enumerate(every):
        assert all(not torch.equal(one, other) for other in every[i + 1 :])


def test_the_same_seed_gives_the_same_bits_and_the_global_state_is_untouched(data):
    membership = random_subsets(N, 5, 10)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    inputs = [t.clone() for t in (data.features, data.logits, data.labels)]
    first, second, other = (data.train(membership, seed=s) for s in (1, 1, 2))
    for name, tensor in first.operators.state_dict().items():
        assert torch.equal(tensor, second.operators.state_dict()[name])
    assert not torch.equal(first.operators.steering_matrices, other.operators.steering_matrices)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    assert all(map(torch.equal, inputs, (data.features, data.logits, data.labels)))
    assert data.head.weight.grad is None


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "steering"), EVERY_FORM)
def test_an_operator_improves_the_fidelity_of_its_own_subset_most(data, encoder, steering):
    membership = partition(N, 4)
    trained = data.train(
        membership, encoder=encoder, steering=steering, head=data.head, iterations=80, batch_size=15,
        stability_weight=0.3,
    )  # fmt: skip
    shift = trained.operators.shift(data.features)
    own = [torch.from_numpy(members(membership, k)) for k in range(4)]
    table = torch.tensor(
        [[float(fidelity(data.logits[s], shift[k, s], data.labels[s])) for s in own] for k in range(4)]
    )
    before = torch.tensor(
        [float(fidelity(data.logits[s], torch.zeros(15, N_CLASSES), data.labels[s])) for s in own]
    )
    assert bool((table.diagonal() < before).all())
    assert torch.equal((table - before).argmin(0), torch.arange(4))
    losses = trained.history["fidelity"]
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()


@pytest.mark.slow
def test_more_linearity_weight_gives_more_linear_responses(data):
    membership = partition(N, 4)
    for reading in ("example", "subset"):
        weak, strong = (
            data.train(membership, linearity=reading, linearity_weight=w, iterations=60).history["linearity"]
            for w in (1e-3, 100.0)
        )
        assert strong[-5:].mean() < 0.5 * weak[-5:].mean()


def test_the_history_has_one_entry_a_step(data):
    history = data.train(random_subsets(N, 5, 10), iterations=7, linearity_weight=0.0).history
    assert {name: len(losses) for name, losses in history.items()} == dict.fromkeys(
        ("fidelity", "stability", "linearity"), 7
    )
    assert bool(history["linearity"].isnan().all())
    assert float(history["stability"][0]) == pytest.approx(0, abs=1e-6)
    assert bool(history["fidelity"].isfinite().all())
    whole = data.train(random_subsets(N, 5, 10), iterations=7).history
    assert bool(whole["linearity"].isfinite().all())


@pytest.mark.parametrize("encoder", ["shared", "per-subset"])
def test_bfloat16_follows_float32(data, encoder):
    membership = random_subsets(N, 5, 10)
    exact, rounded = (
        data.train(membership, precision=p, encoder=encoder).operators for p in ("float32", "bfloat16")
    )
    assert rounded.steering_matrices.dtype == torch.float32
    reference = exact.shift(data.features)
    assert not torch.equal(rounded.shift(data.features), reference)
    assert float((rounded.shift(data.features) - reference).norm() / reference.norm()) < 0.1


def test_tf32_leaves_the_global_setting_as_it_was(data):
    before = torch.get_float32_matmul_precision()
    data.train(random_subsets(N, 5, 10), precision="tf32", iterations=1)
    assert torch.get_float32_matmul_precision() == before


def test_half_precision_features_are_read_as_float32(data):
    membership = random_subsets(N, 5, 10)
    data.features = data.features.half().float()
    reference = data.train(membership)
    data.features = data.features.half()
    stored = data.train(membership)
    assert torch.equal(stored.operators.steering_matrices, reference.operators.steering_matrices)


def test_the_cosine_schedule_falls_from_the_learning_rate_to_nothing(data):
    constant, cosine = (
        Trained(iterations=40, learning_rate=0.01, schedule=s) for s in ("constant", "cosine")
    )
    assert [step_size(constant, step) for step in (0, 39)] == [0.01, 0.01]
    assert [step_size(cosine, step) for step in (0, 20)] == pytest.approx([0.01, 0.005])
    assert 0 < step_size(cosine, 39) < 1e-4
    membership, options = random_subsets(N, 5, 30), {"batch_size": 100, "rank": 2}
    flat, fallen = (data.train(membership, schedule=s, **options) for s in ("constant", "cosine"))
    moves = [h.history["fidelity"].diff().abs()[-1] for h in (flat, fallen)]
    assert moves[1] < 0.2 * moves[0]


@pytest.mark.filterwarnings("ignore:.*training examples are in no subset")
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_paper_s_presets_run(data, name):
    config = Trained.paper(name, iterations=3, subsets=Partition(5, size=4))
    membership = config.subsets.draw(N, config.seed)
    trained = train_operators(data.features, data.logits, data.labels, membership, config)
    assert trained.operators.steering_matrices.shape == (5, config.rank, N_CLASSES)
    for loss in ("fidelity", "stability", "linearity"):
        assert bool(trained.history[loss].isfinite().all())


def test_progress_goes_to_the_error_stream_only_where_asked(data, capsys):
    data.train(random_subsets(N, 5, 10), iterations=2)
    assert capsys.readouterr().err == ""
    data.train(random_subsets(N, 5, 10), iterations=2, show_progress=True)
    assert "operators" in capsys.readouterr().err


def test_arguments_that_do_not_fit_are_named(data):
    membership = random_subsets(N, 5, 10)
    config = Trained(iterations=1)
    f, z, y = data.features, data.logits, data.labels
    with pytest.raises(ValueError, match=r"`features` must be a float matrix \(n_rows, d\); got torch.int64"):
        train_operators(f.long(), z, y, membership, config)
    with pytest.raises(ValueError, match=r"`logits` must have shape \(60, n_classes\); got \(59, 3\)"):
        train_operators(f, z[1:], y, membership, config)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(60,\); got \(59,\)"):
        train_operators(f, z, y[1:], membership, config)
    with pytest.raises(ValueError, match="`membership` must have n_train = 60 columns; got 61"):
        train_operators(f, z, y, random_subsets(61, 5, 10), config)
    for wrong, size in ([], 0), (range(N), N):
        subsets = membership_from_indices([[0], wrong], N)
        with pytest.raises(ValueError, match=f"`membership` must hold .* got {size} of 60 .* in subset 1"):
            train_operators(f, z, y, subsets, config)
    with pytest.raises(ValueError, match="`head` must turn `features` into `logits`; got a difference of"):
        train_operators(2 * f, z, y, membership, config, head=data.head)
    with pytest.raises(ValueError, match="`head_weight` must be the weight of the Linear"):
        data.train(membership, steering="representation")


def test_losses_that_become_nan_are_refused(data):
    with pytest.raises(ValueError, match="`learning_rate` must be small enough for the operators"):
        data.train(random_subsets(N, 5, 10), learning_rate=1e30, iterations=30)
