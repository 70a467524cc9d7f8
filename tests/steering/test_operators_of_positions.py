"""Trained operators of examples with several positions, against a dense reference and by laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE, Batch, Lasso, LeftRegular, Partition, RandomSubsets, Ridge, Trained
from stride_captum.positions import Positions
from stride_captum.recovery import ridge_scale
from stride_captum.responses import response_value
from stride_captum.steering.gradient import BatchGradient
from stride_captum.steering.operators import SteeringOperators
from stride_captum.steering.rows import ExampleRows
from stride_captum.steering.training import train_operators
from stride_captum.subsets import members, random_subsets, sketch, sketch_projection

N, N_TEST, P, D, C, K = 20, 5, 4, 6, 3, 9
IGNORED = -100


class Tagger(nn.Module):
    """Tokens `(n, P, D)` to logits `(n, P, C)`, each token on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(tokens)))


@pytest.fixture
def tagged():
    """A network, training tokens with labels of which some are ignored, and test points; in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tagger().double().eval()
        x, y = torch.randn(N, P, D).double(), torch.randint(C, (N, P))
        tests = torch.randn(N_TEST, P, D).double(), torch.randint(C, (N_TEST, P))
    y[3], y[5, 1:], y[8, 2:], tests[1][2, 1:] = IGNORED, IGNORED, IGNORED, IGNORED
    return model, TensorDataset(x, y), tests


def stride(model: nn.Module, train: Any, **options: Any) -> STRIDE:
    own = {"rank": 4, "iterations": 15, "subsets": LeftRegular(K, degree=3), "recovery": Ridge()}
    beside = {
        k: options.pop(k) for k in ("batch", "memory_budget", "feature_store", "held_out") if k in options
    }
    return STRIDE(
        model, train, operators=Trained(**own | options), layers=["head:input"], batch_size=7, **beside
    )


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    """Equal up to a share of the largest."""
    assert found.shape == wanted.shape
    assert float(wanted.abs().max()) > 0
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


class Dense:
    """Stage 1 with whole subsets as batches, one example and one position after the other."""

    def __init__(self, model, train, omega, options):
        x, y = train.tensors
        self.counted = (y != IGNORED) & (omega > 0)
        with torch.no_grad():
            self.h, self.z = torch.tanh(model.hidden(x)), model(x)
        by_logits = options.steering == "logits"
        weight = (omega * self.counted).sum()
        squares = (self.h.square().sum(2) * omega * self.counted).sum()
        self.scale = (D * weight / squares) ** 0.5 if by_logits else torch.tensor(1.0)
        self.kept = [i for i in range(len(x)) if self.counted[i].any()]
        self.omega, self.y, self.options = omega * len(self.kept) / weight, y, options
        self.membership = options.subsets.draw(len(self.kept), options.seed)
        self.head = None if by_logits else model.head.weight.detach()
        start = SteeringOperators(
            D, C, K, 4, encoder=options.encoder, steering=options.steering, head_weight=self.head,
            generator=torch.Generator().manual_seed(options.seed), dtype=torch.float64,
        )  # fmt: skip
        self.parts = {name: p.detach().clone().requires_grad_() for name, p in start.named_parameters()}
        optimizer = torch.optim.Adam(self.parts.values(), lr=options.learning_rate)
        for _ in range(options.iterations):
            optimizer.zero_grad()
            self.objective().backward()
            optimizer.step()

    def shift(self, k: int, h: Tensor) -> Tensor:
        """Of one position, `(C,)`."""
        own = {n: p[k] if self.options.encoder == "per-subset" else p for n, p in self.parts.items()}
        hidden = (own["hidden_weight"] @ (h * self.scale) + own["hidden_bias"]).relu()
        phi, a = own["output_weight"] @ hidden + own["output_bias"], self.parts["steering_matrices"][k]
        return a.T @ phi if self.head is None else self.head @ (phi.reshape(4, D).T @ a)

    def summed(self, k: int, i: int, term: Any) -> Tensor:
        """Sum of a function of logits, shift and label over the positions of an example."""
        return sum(
            self.omega[i, t] * term(self.z[i, t], self.shift(k, self.h[i, t]), self.y[i, t])
            for t in range(P)
            if self.counted[i, t]
        )

    def objective(self) -> Tensor:
        o, n = self.options, len(self.kept)
        total, responses = torch.zeros(()).double(), []
        rows = sketch_projection(n, o.sketch_width, o.seed)
        eye = o.sketch_ridge * torch.eye(o.sketch_width).double()
        for k in range(K):
            inside = [self.kept[j] for j in members(self.membership, k)]
            outside = [i for i in self.kept if i not in inside]
            fid = [self.summed(k, i, lambda z, s, y: F.cross_entropy(z + s, y)) for i in inside]
            stab = [
                self.summed(
                    k, i, lambda z, s, y: (z.softmax(0) * (z.log_softmax(0) - (z + s).log_softmax(0))).sum()
                )
                for i in outside
            ]
            own = torch.stack([self.summed(k, i, lambda z, s, y: s.max()) for i in inside])
            total = total + sum(fid) / len(fid) + o.stability_weight * sum(stab) / len(stab)
            if o.linearity == "example":
                x = rows[torch.from_numpy(members(self.membership, k))]
                total = total + o.linearity_weight * self.unexplained(x, own, eye)
            responses.append(own.mean())
        if o.linearity == "subset":
            x = sketch(self.membership, n, o.sketch_width, o.seed)
            total = total + o.linearity_weight * self.unexplained(x, torch.stack(responses), eye)
        return total + o.weight_decay / 2 * self.parts["steering_matrices"].square().sum()

    @staticmethod
    def unexplained(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
        return (x @ torch.linalg.inv(x.T @ x + ridge) @ x.T @ y - y).square().sum()

    @torch.no_grad()
    def influence(self, model, tests, response="margin"):
        """Ridge regression of the summed changes of the response on the membership."""
        (x, y), changes = tests, torch.zeros(len(tests[0]), K).double()
        h, z = torch.tanh(model.hidden(x)), model(x)
        for i, t in (y != IGNORED).nonzero().tolist():
            for k in range(K):
                moved = torch.stack([z[i, t], z[i, t] + self.shift(k, h[i, t])])
                before, after = response_value(moved, y[i, t].expand(2), response)
                changes[i, k] += after - before
        dense = torch.from_numpy(self.membership.toarray())
        dense, changes = dense - dense.mean(0), changes - changes.mean(1, keepdim=True)
        penalty = 0.03 * float(ridge_scale(self.membership, center=True))
        solved = torch.linalg.solve(dense @ dense.T + penalty * torch.eye(K).double(), changes.T)
        scores = torch.zeros(len(x), len(self.y)).double()
        scores[:, self.kept] = (dense.T @ solved).T
        return scores


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"linearity": "subset", "weight_decay": 0.1},
        {"linearity": "example", "linearity_weight": 3.0},
        {"encoder": "per-subset", "stability_weight": 0.5},
        {"steering": "representation"},
    ],
    ids=["subset", "example", "per-subset", "representation"],
)
@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("weighted", [False, True])
def test_operators_are_those_of_the_sums_over_positions(tagged, options, budget, weighted):
    model, train, tests = tagged
    omega = torch.ones(N, P).double()
    if weighted:
        omega = torch.rand(N, P, generator=torch.Generator().manual_seed(2)).double()
        omega[7], omega[:, 2] = 0, 0
    batch = Batch(sample_weight=omega) if weighted else None
    options = {"iterations": 4, "schedule": "constant", **options}
    method = stride(model, train, batch=batch, memory_budget=budget, **options)
    dense = Dense(model, train, omega, method.operators)
    same(method.influence(tests), dense.influence(model, tests))
    same(method.influence(tests, response="loss"), dense.influence(model, tests, "loss"))
    assert method.coverage_.tolist() == [
        i in dense.kept and bool(dense.membership[:, [dense.kept.index(i)]].nnz) for i in range(N)
    ]


class TestLaws:
    @pytest.mark.slow
    @pytest.mark.parametrize("linearity", ["subset", "example"])
    @pytest.mark.parametrize("recovery", [Ridge(), Lasso()])
    def test_one_position_is_an_example_without(self, tagged, linearity, recovery):
        """With the same subsets, and batches smaller than these."""
        model, train, tests = tagged
        x, y = train.tensors[0][:, 0], train.tensors[1][:, 0].clamp_min(0)
        options = {"linearity": linearity, "recovery": recovery, "batch_size": 4}
        one = stride(model, TensorDataset(x[:, None], y[:, None]), **options)
        plain = stride(model, TensorDataset(x, y), **options)
        few = tests[0][:, :1], tests[1][:, :1]
        same(one.influence(few), plain.influence((few[0][:, 0], few[1][:, 0])))
        same(one.self_influence(), plain.self_influence())

    def test_an_example_with_one_label_is_that_position(self, tagged):
        model, train, tests = tagged
        x, places = train.tensors[0], torch.arange(N) % P
        y = torch.full((N, P), IGNORED)
        y[torch.arange(N), places] = places % C
        whole = stride(model, TensorDataset(x, y), batch_size=4)
        plain = stride(model, TensorDataset(x[torch.arange(N), places], places % C), batch_size=4)
        asked = torch.full((N_TEST, P), IGNORED)
        asked[:, 2] = 1
        same(whole.influence((tests[0], asked)), plain.influence((tests[0][:, 2], asked[:, 2])))

    def test_padding_changes_nothing(self, tagged):
        model, train, tests = tagged
        (x, y), (xt, yt) = train.tensors, tests
        longer = TensorDataset(F.pad(x, (0, 0, 0, 3), value=2.0), F.pad(y, (0, 3), value=IGNORED))
        padded = F.pad(xt, (0, 0, 0, 2), value=2.0), F.pad(yt, (0, 2), value=IGNORED)
        same(
            stride(model, longer, batch_size=4).influence(padded),
            stride(model, train, batch_size=4).influence(tests),
        )

    def test_an_example_without_labels_is_as_if_it_were_not_there(self, tagged):
        model, train, tests = tagged
        x, y = train.tensors
        others = [i for i in range(N) if i != 3]
        method = stride(model, train, batch_size=4)
        scores = method.influence(tests)
        fewer = stride(model, TensorDataset(x[others], y[others]), batch_size=4)
        same(scores[:, others], fewer.influence(tests), 1e-12)
        assert bool((scores[:, 3] == 0).all())
        assert not method.coverage_[3]
        assert method.n_train_ == N

    @pytest.mark.slow
    @pytest.mark.parametrize("positions", [True, False])
    def test_a_weight_of_0_is_removal_and_their_unit_does_not_count(self, tagged, positions):
        model, train, tests = tagged
        x, y = train.tensors if positions else (train.tensors[0][:, 0], train.tensors[1][:, 0].clamp_min(0))
        asked = tests if positions else (tests[0][:, 0], tests[1][:, 0].clamp_min(0))
        weights = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(3)).double()
        weights[[2, 6]] = 0
        others = [i for i in range(N) if i not in (2, 6)]
        found = [
            stride(model, TensorDataset(x, y), batch=Batch(sample_weight=w)).influence(asked)
            for w in (weights, 7 * weights)
        ]
        same(found[1], found[0])
        few = TensorDataset(x[others], y[others])
        wanted = stride(model, few, batch=Batch(sample_weight=weights[others])).influence(asked)
        same(found[0][:, others], wanted, 1e-12)
        assert bool((found[0][:, [2, 6]] == 0).all())
        assert float((stride(model, few).influence(asked) - wanted).abs().max()) > 1e-3 * float(wanted.max())

    def test_an_ignored_position_has_weight_0(self, tagged):
        model, train, tests = tagged
        x, y = train.tensors[0], train.tensors[1].clamp_min(0)
        weights, ignored = torch.ones(N, P), y.clone()
        weights[:, 1], ignored[:, 1] = 0, IGNORED
        weighted = stride(model, TensorDataset(x, y), batch=Batch(sample_weight=weights), batch_size=4)
        wanted = stride(model, TensorDataset(x, ignored), batch_size=4).influence(tests)
        same(weighted.influence(tests), wanted, 1e-12)

    def test_no_weight_at_all_is_refused(self, tagged):
        method = stride(*tagged[:2], batch=Batch(sample_weight=torch.zeros(N)))
        with pytest.raises(ValueError, match="`sample_weight` must be above 0 for some example"):
            method.fit()


class TestQueries:
    @pytest.mark.slow
    def test_scores_of_positions_add_up_with_a_linear_recovery(self, tagged):
        model, train, tests = tagged
        method = stride(model, train, memory_budget=2000)
        split = method.influence(tests, per_position=True)
        assert split.shape == (N_TEST, P, N)
        same(split.sum(1), method.influence(tests))
        assert bool((split[2, 1:] == 0).all())
        alone = tests[0], torch.full_like(tests[1], IGNORED)
        alone[1][:, 0] = tests[1][:, 0]
        same(split[:, 0], method.influence(alone))

    def test_what_does_not_add_up_is_refused(self, tagged):
        model, train, tests = tagged
        match = r"`recovery` must be linear.*got 'lasso'.*Write Trained\(recovery=Ridge\(\)\)"
        with pytest.raises(ValueError, match=match):
            stride(model, train, recovery=Lasso()).influence(tests, per_position=True)
        method = stride(model, train)
        with pytest.raises(ValueError, match=r"`operators` must be ClosedForm\(form='rows'\).*got 'trained'"):
            method.positions_of(tests, 0)
        with pytest.raises(ValueError, match="`normalize` must be None for operators='trained'"):
            method.influence(tests, normalize="cosine")
        with pytest.raises(ValueError, match="`per_label` must be False"):
            method.mislabel_scores(per_label=True)
        plain = stride(model, TensorDataset(train.tensors[0][:, 0], train.tensors[1][:, 0].clamp_min(0)))
        with pytest.raises(ValueError, match="`per_position` must be a method"):
            plain.influence((tests[0][:, 0], tests[1][:, 0]), per_position=True)

    def test_targets_and_deviations(self, tagged):
        model, train, tests = tagged
        method = stride(model, train)
        targets = torch.arange(N_TEST) % C
        labels = targets[:, None].expand(-1, P)
        same(method.influence((tests[0],), target=targets), method.influence((tests[0], labels)))
        plain, unit = method.influence(tests), method.influence(tests, normalize="deviation")
        same(unit, plain / plain.std(1, correction=0, keepdim=True))

    def test_top_k_and_self_influence_are_those_of_the_scores(self, tagged):
        model, train, tests = tagged
        method = stride(model, train)
        scores = method.influence(tests)
        same(method.influence(tests, 4).influence_scores, scores.topk(4).values)
        same(method.self_influence(), -method.influence(train.tensors, response="loss").diagonal())
        assert torch.equal(method.mislabel_scores(), method.self_influence())

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", [1, 2000])
    def test_the_memory_budget_and_batches_change_rounding_only(self, tagged, budget):
        model, train, tests = tagged
        whole = stride(model, train, batch_size=4)
        scores = whole.influence(tests)
        small = stride(model, train, batch_size=4, memory_budget=budget)
        same(small.influence(tests), scores)
        same(whole.influence(DataLoader(TensorDataset(*tests), batch_size=2)), scores)
        assert small.operators_.test_points_at_once() < whole.operators_.test_points_at_once()

    def test_a_test_point_without_labels_scores_0(self, tagged):
        model, train, tests = tagged
        none = torch.full_like(tests[1][:1], IGNORED)
        assert bool((stride(model, train).influence((tests[0][:1], none)) == 0).all())

    def test_pixels(self):
        class Segmenter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.maps, self.head = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, C, 1)

            def forward(self, images: Tensor) -> Tensor:
                return self.head(torch.tanh(self.maps(images)))

        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(N, 1, 3, 4, generator=generator), torch.randint(C, (N, 3, 4), generator=generator)
        operators = Trained(rank=4, iterations=3, subsets=Partition(4), recovery=Ridge())
        method = STRIDE(Segmenter(), TensorDataset(x, y), operators=operators)
        split = method.influence((x[:2], y[:2]), per_position=True)
        assert split.shape == (2, 12, N)
        same(split.sum(1), method.influence((x[:2], y[:2])), 1e-4)


@pytest.mark.slow
def test_saved_and_loaded_and_read_from_a_store(tagged, tmp_path):
    model, train, tests = tagged
    method = stride(model, train, memory_budget=5000)
    scores = method.influence(tests)
    method.save(tmp_path / "method")
    again = STRIDE.load(tmp_path / "method", model, train)
    assert torch.equal(again.influence(tests), scores)
    assert again.operators_.test_points_at_once() == method.operators_.test_points_at_once()


@pytest.mark.slow
def test_a_store_gives_the_same_operators(tagged, tmp_path):
    model, train, tests = tagged
    x, y = train.tensors
    wanted = stride(model.float(), TensorDataset(x.float(), y)).influence((tests[0].float(), tests[1]))
    for _ in range(2):  # filled, and read
        stored = stride(model, TensorDataset(x.float(), y), feature_store=tmp_path / "store")
        assert torch.equal(stored.influence((tests[0].float(), tests[1])), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("positions", [True, False])
def test_a_store_holds_float32_of_a_model_in_float64(tagged, tmp_path, positions):
    model, train, tests = tagged
    x, y = train.tensors if positions else (train.tensors[0][:, 0], train.tensors[1][:, 0].clamp_min(0))
    asked = tests if positions else (tests[0][:, 0], tests[1][:, 0].clamp_min(0))
    found = stride(model, TensorDataset(x, y), feature_store=tmp_path / "store").influence(asked)
    single = asked[0].float(), asked[1]
    same(found.float(), stride(model.float(), TensorDataset(x.float(), y)).influence(single), 1e-3)


@pytest.mark.slow
def test_an_estimate_is_of_small_runs(tagged):
    method = stride(*tagged[:2], subsets=RandomSubsets(K))
    found = method.estimate(n_test=3)
    assert found.fit_seconds > 0
    assert found.query_seconds > 0
    assert "with 4 and 16 steps" in found.basis
    assert method._states is None


@pytest.mark.parametrize(("batch_size", "width"), [(1, 1), (8, 2), (18, 4), (1000, 22)])
def test_a_batch_has_as_many_rows_as_without_positions(batch_size, width):
    counts = torch.tensor([2, 6] * 12)
    n_rows, like = int(counts.sum()), torch.zeros(())
    arrays = torch.randn(n_rows, D), torch.randn(n_rows, C), torch.zeros(n_rows, dtype=torch.int64)
    rows = ExampleRows.placed(*arrays, Positions(counts), None, like)
    options = Trained(batch_size=batch_size, rank=2)
    membership = random_subsets(24, K, 2)
    gradient = BatchGradient(SteeringOperators(D, C, K, 2), rows, membership, options, 0, 2**28)
    assert gradient.width == width


def test_arrays_of_positions_that_do_not_fit_are_named():
    h, z, y = torch.randn(7, D), torch.randn(7, C), torch.zeros(7, dtype=torch.int64)
    subsets, options = random_subsets(4, 2, 2), Trained(iterations=1, rank=2)
    with pytest.raises(ValueError, match="`positions` must have n_rows = 7 rows together; got 6"):
        train_operators(h, z, y, subsets, options, positions=Positions(torch.tensor([2, 1, 1, 2])))
    with pytest.raises(ValueError, match="`membership` must have n_train = 3 columns; got 4"):
        train_operators(h, z, y, subsets, options, positions=Positions(torch.tensor([4, 1, 2])))
