"""Laws about use: what goes in, what is refused, and what is left behind.

Each is one function whose name states it; `stride_captum.conformance` runs them all on planted data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ..system.random_states import same_random_state
from .registry import Build, Violation, close, law, loader, refuses, require, same_bits
from .toy_problems import (
    MLP,
    N_TEST,
    N_TRAIN,
    BatchNormCNN,
    Fails,
    Items,
    TwoInputs,
    built,
    planted_classes,
    trace,
    trained,
    unusual,
)

# Kinds of inputs.


@law
def a_loader_scores_as_its_data_set(build: Build) -> None:
    """Data sets, loaders and batches of the same examples, on both sides."""
    model, train, test = trained(MLP)
    method = build(model, train)
    scores, top = method.influence(test.tensors), method.influence(test.tensors, 4)
    for name, source in (("a loader", loader(train, 7)), ("a plain data set", Items(train))):
        other = build(model, source)
        close(other.influence(test.tensors), scores, f"{name} as training set")
        close(other.self_influence(), method.self_influence(), f"{name} as training set, self-influence")
    for inputs in (list(test.tensors), loader(test, 3), test, Items(test)):
        name = type(inputs).__name__
        close(method.influence(inputs), scores, f"{name} as inputs")
        same_bits(method.influence(inputs, 4).indices, top.indices, f"{name} as inputs, the top 4")
        sums = method.subset_influence(inputs, [range(N_TRAIN)])
        close(
            sums, method.subset_influence(test.tensors, [range(N_TRAIN)]), f"{name} as inputs, sums", scores
        )


@law
def dict_batches_score_as_tuples(build: Build) -> None:
    """`model(**batch without labels)`, with the labels under "labels"."""
    model, train, test = trained(MLP)
    wanted = build(model, train).influence(test.tensors)
    items, inputs = ([{"x": a, "labels": b} for a, b in zip(*d.tensors, strict=True)] for d in (train, test))
    method = build(model, Items(items))
    batch = dict(zip(("x", "labels"), test.tensors, strict=True))
    for name, given in (("a batch", batch), ("a data set", Items(inputs)), ("a loader", loader(inputs, 3))):
        close(method.influence(given), wanted, f"{name} of dicts")


class _Halves(nn.Module):
    """A network of two inputs that reads them side by side in one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x[..., :6]` and `x[..., 6:]`."""
        logits: Tensor = self.network(x[..., :6], x[..., 6:])
        return logits


@law
def two_inputs_score_as_one_that_holds_both(build: Build) -> None:
    """`model(*batch[:-1])`, or by name for a dict."""
    (x, y), (u, v) = planted_classes(20, seed=1).tensors, planted_classes(N_TEST, seed=2).tensors
    model = built(TwoInputs)
    whole = build(_Halves(model), TensorDataset(torch.cat([x, x.flip(-1)], -1), y))
    wanted = whole.influence((torch.cat([u, u.flip(-1)], -1), v))
    parts = build(model, TensorDataset(x, x.flip(-1), y))
    close(parts.influence((u, u.flip(-1), v)), wanted, "a tuple")
    items = [{"first": a, "second": a.flip(-1), "labels": b} for a, b in zip(x, y, strict=True)]
    named = build(model, Items(items)).influence({"first": u, "second": u.flip(-1), "labels": v})
    close(named, wanted, "a dict")


# What is refused.


@law
def an_empty_input_is_refused(build: Build) -> None:
    """With a ValueError: no test points, no training examples."""
    model, train, test = trained(MLP)
    method = build(model, train)
    refuses(lambda: method.influence(tuple(t[:0] for t in test.tensors)), "an empty batch")
    refuses(lambda: method.influence(Items([])), "an empty data set")
    empty = TensorDataset(*(t[:0] for t in train.tensors))
    refuses(lambda: build(model, empty).influence(test.tensors), "an empty training set")


@law
def a_shuffling_loader_is_refused(build: Build) -> None:
    """Column i is the i-th training example, so the order must be fixed."""
    model, train, test = trained(MLP)
    with same_random_state():
        shuffled = [DataLoader(data, batch_size=4, shuffle=True) for data in (train, test)]
        refuses(lambda: build(model, shuffled[0]).influence(test.tensors), "as training set")
        refuses(lambda: build(model, train).influence(shuffled[1]), "as test inputs")


def _shows_nan(scores: Tensor, what: str) -> None:
    """Every entry NaN; a method that keeps only some columns may have zeros between them."""
    require(scores.isnan().any(), f"{what}: no score is NaN")
    require((scores.isnan() | (scores == 0)).all(), f"{what}: some scores are numbers")


@law
def nan_in_a_test_point_is_never_hidden(build: Build) -> None:
    """NaN in its row (and in its top k) or a ValueError; the other rows are what they were."""
    model, train, test = trained(MLP)
    x, y = test.tensors
    method = build(model, train)
    wanted = method.influence((x, y))
    spoilt = x.clone()
    spoilt[2] = float("nan")
    with suppress(ValueError):
        scores = method.influence((spoilt, y))
        _shows_nan(scores[2], "the row")
        others = [i for i in range(N_TEST) if i != 2]
        close(scores[others], wanted[others], "the other rows")
        top = method.influence((spoilt, y), 3)
        require(top.influence_scores[2].isnan().all(), "the top k: numbers")
        first = scores[2].isnan().nonzero()[:3, 0]
        same_bits(top.indices[2], first, "the top k: the first columns with NaN")
        sums = method.subset_influence((spoilt, y), [[0], range(N_TRAIN)])
        require(sums[2, 1].isnan(), "the sum of all columns: a number")


@law
def nan_in_a_training_example_is_never_hidden(build: Build) -> None:
    """NaN in its column or a ValueError."""
    model, train, test = trained(MLP)
    x, y = train.tensors
    for value in (float("nan"), float("inf"), float("-inf")):
        spoilt = x.clone()
        spoilt[7].view(-1)[2] = value
        with suppress(ValueError):
            scores = build(model, TensorDataset(spoilt, y)).influence(test.tensors)
            _shows_nan(scores[:, 7], f"the column of {value}")


@law
def a_model_that_has_changed_is_refused(build: Build) -> None:
    """Other weights than those of `fit`: a ValueError until they are back, or until the next fit."""
    model, train, test = trained(MLP)
    method = build(model, train)
    wanted = method.influence(test.tensors)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    model.fc3.weight.data.mul_(2)
    calls: dict[str, Callable[[], Any]] = {
        "influence": lambda: method.influence(test.tensors),
        "the top k": lambda: method.influence(test.tensors, 3),
        "self_influence": method.self_influence,
        "subset_influence": lambda: method.subset_influence(test.tensors, [[0]]),
    }
    for what, call in calls.items():
        refuses(call, what)
    model.load_state_dict(old)
    close(method.influence(test.tensors), wanted, "the old weights written back")
    model.fc3.weight = nn.Parameter(old["fc3.weight"].clone())
    close(method.influence(test.tensors), wanted, "the old weights in a new parameter")
    with torch.no_grad():
        model.fc3.weight.mul_(2)
    fresh = build(model, train).influence(test.tensors)
    same_bits(method.fit().influence(test.tensors), fresh, "fitted again on the new weights")


# What is left behind.


def _expect_untouched(model: nn.Module, what: str, use: Callable[[], Any]) -> None:
    before = trace(model)
    use()
    after = trace(model)
    changed = [key for key in before if before[key] != after[key]]
    require(not changed, f"{what} changed: {', '.join(changed)}")


def _unusual_cnn() -> tuple[nn.Module, TensorDataset, TensorDataset, list[list[Any] | None]]:
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    states = [built(BatchNormCNN, seed).state_dict() for seed in (1, 2)]
    return unusual(model), train, test, [None, states]


@law
def the_model_is_left_as_it_was(build: Build) -> None:
    """Weights, buffers, modes, hooks, requires_grad, gradients and random states, bit for bit.

    With checkpoints and without, after everything that a method can do.
    """
    model, train, test, choices = _unusual_cnn()
    for checkpoints in choices:

        def use(checkpoints: list[Any] | None = checkpoints) -> None:
            method = build(model, Fails(train), batch_size=6, checkpoints=checkpoints).fit()
            method.influence(test.tensors)
            method.influence(loader(Fails(test), 3), 4, False)
            method.self_influence()
            method.mislabel_scores()
            method.subset_influence(test.tensors, [[0, 1], [2]])

        _expect_untouched(model, "with checkpoints" if checkpoints else "without checkpoints", use)


@law
def the_model_is_left_as_it_was_after_an_exception(build: Build) -> None:
    """An example that cannot be read, in the middle of the training set or of the test points."""
    model, train, test, choices = _unusual_cnn()
    for checkpoints in choices:
        spoilt = build(model, Fails(train, at=13), batch_size=4, checkpoints=checkpoints)
        method = build(model, train, checkpoints=checkpoints).fit()

        def use(spoilt: Any = spoilt, method: Any = method) -> None:
            calls = (spoilt.fit, spoilt.fit, lambda: method.influence(loader(Fails(test, at=5), 2)))
            for call in calls:
                try:
                    call()
                except RuntimeError:
                    continue
                raise Violation("the exception of a broken example was swallowed")

        _expect_untouched(model, "with checkpoints" if checkpoints else "without checkpoints", use)


@law
def the_callers_tensors_are_not_written_to(build: Build) -> None:
    """Neither the training set nor the test points."""
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    before = [t.clone() for t in (*train.tensors, *test.tensors)]
    method = build(model, train)
    method.influence(test.tensors, 3)
    method.influence(list(test.tensors))
    method.self_influence()
    for old, new in zip(before, (*train.tensors, *test.tensors), strict=True):
        same_bits(new, old, "a tensor of the caller")


@law
def the_cost_is_recorded(build: Build) -> None:
    """`fit_seconds_`, `query_seconds_`, `n_train_`; the first use fits, and `fit` returns the method."""
    model, train, test = trained(MLP)
    method = build(model, train)
    require(method.fit() is method, "fit does not return the method")
    method.influence(test.tensors)
    for name in ("fit_seconds_", "query_seconds_"):
        require(getattr(method, name) > 0, f"{name} is {getattr(method, name)}")
    require(method.n_train_ == N_TRAIN, f"n_train_ is {method.n_train_}")
    for name in ("self_influence", "mislabel_scores"):
        shape = getattr(build(model, train), name)().shape
        require(shape == (N_TRAIN,), f"the first use by {name} has the shape {tuple(shape)}")
    shape = build(model, train).subset_influence(test.tensors, [[0, 1]]).shape
    require(shape == (N_TEST, 1), f"the first use by subset_influence has the shape {tuple(shape)}")
