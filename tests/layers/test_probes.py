from __future__ import annotations

import pytest
import torch
from small_nets import Net, hooks_on, net, noise
from torch import nn
from torch.nn import functional as F

from stride_captum.layers.agreement import are_alike, rounding
from stride_captum.layers.layouts import Layout, batch_layout
from stride_captum.layers.probes import check_deterministic, spread

N = 6


def check(model: nn.Module, *inputs: torch.Tensor) -> None:
    """In eval mode, as a method has it."""
    given = (*inputs, torch.zeros(len(inputs[0])))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        check_deterministic(model.eval(), given)


def between(middle) -> nn.Module:
    """A network with something between its two Linear layers."""
    return net(
        lambda m, x: m.head(middle(m, m.body(x))),
        body=lambda: nn.Linear(5, 8),
        norm=lambda: nn.BatchNorm1d(8, track_running_stats=False),
        head=lambda: nn.Linear(8, 3),
    )


class TestModelsThatDependOnChance:
    @pytest.mark.parametrize(
        ("middle", "where"),
        [
            (lambda m, h: F.dropout(h), r"in what reaches 'head' \(Linear\)"),
            (lambda m, h: h + 0.01 * torch.randn_like(h), r"in what reaches 'head' \(Linear\)"),
            (lambda m, h: h * (torch.rand(len(h), 1) > 0.5), r"in what reaches 'head' \(Linear\)"),
        ],
        ids=["dropout", "noise", "depth"],
    )
    def test_are_refused_with_the_place(self, middle, where):
        with pytest.raises(
            ValueError,
            match=rf"`model` must give an example the same outputs in every pass; got outputs that change by "
            rf"chance, first {where}. F.dropout\(x\) drops in eval mode too: write F.dropout\(x, tr",
        ):
            check(between(middle), noise(N, 5))

    def test_a_module_that_draws_is_named(self):
        model = between(lambda m, h: m.drop(h))
        model.drop = Net(lambda m, h: F.dropout(h, 0.5))
        with pytest.raises(ValueError, match=r"that change by chance, first at 'drop' \(Net\)\. F\.dropout"):
            check(model, noise(N, 5))

    def test_noise_on_the_outputs(self):
        model = net(lambda m, x: m.head(x) + torch.randn(len(x), 3), head=lambda: nn.Linear(5, 3))
        with pytest.raises(ValueError, match="change by chance, first in the `forward` of the model itself"):
            check(model, noise(N, 5))

    def test_noise_that_hardly_moves_the_outputs_shows_where_it_is_made(self):
        model = between(lambda m, h: h + 1e-4 * m.noisy(h))
        model.noisy = Net(lambda m, h: torch.randn_like(h))
        with pytest.raises(ValueError, match=r"change by chance, first at 'noisy' \(Net\)"):
            check(model, noise(N, 5))

    def test_what_is_drawn_and_not_used_is_no_fault(self):
        model = between(lambda m, h: (m.noisy(h), h)[1])
        model.noisy = Net(lambda m, h: torch.randn_like(h))
        check(model, noise(N, 5))


class TestModelsThatDependOnTheBatch:
    @pytest.mark.parametrize(
        ("middle", "where"),
        [
            (lambda m, h: m.norm(h), r"at 'norm' \(BatchNorm1d\)"),
            (lambda m, h: h - h.mean(0), r"in what reaches 'head' \(Linear\)"),
            (lambda m, h: h / h.abs().amax(), r"in what reaches 'head' \(Linear\)"),
            (lambda m, h: h.softmax(0), r"in what reaches 'head' \(Linear\)"),
            (lambda m, h: h + h.roll(1, 0), r"in what reaches 'head' \(Linear\)"),
        ],
        ids=["batch norm", "mean", "max", "softmax", "neighbor"],
    )
    def test_are_refused_with_the_place(self, middle, where):
        with pytest.raises(
            ValueError,
            match=rf"`model` must give an example the same outputs in every batch; got outputs that change "
            rf"with the other examples, first {where}. Normalize with running statistics, or over the",
        ):
            check(between(middle), noise(N, 5))

    def test_time_first(self):
        model = net(
            lambda m, x: m.head(m.norm(m.body(x.transpose(0, 1)).mean(0))),
            body=lambda: nn.Linear(5, 8),
            norm=lambda: nn.BatchNorm1d(8, track_running_stats=False),
            head=lambda: nn.Linear(8, 3),
        )
        with pytest.raises(ValueError, match=r"first at 'norm' \(BatchNorm1d\)"):
            check(model, noise(N, 3, 5))

    def test_one_output_for_the_whole_batch(self):
        model = net(lambda m, x: m.head(x).mean(0, keepdim=True), head=lambda: nn.Linear(5, 3))
        with pytest.raises(
            ValueError,
            match=r"`model` must return outputs with one row per example; got the shape \(1, 3\) for 3",
        ):
            check(model, noise(N, 5))


def convolutions(dtype=torch.float32) -> nn.Module:
    def block(c_in, c_out):
        return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

    parts = [*block(3, 32), *(p for _ in range(8) for p in block(32, 32)), nn.AdaptiveAvgPool2d(2)]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(128, 10))
    for weight in model.parameters():
        if weight.ndim > 1:  # so that outputs depend on the input through all the layers
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
    return model.to(dtype)


def transformer(dtype=torch.float32) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    body = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
    return Net(lambda m, x: m.head(m.body(x).mean(1)), body=body, head=nn.Linear(32, 10)).to(dtype)


class TestModelsThatOnlyRound:
    """Kernels add in another order for another batch size."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("make", "shape"), [(convolutions, (3, 16, 16)), (transformer, (9, 32))])
    def test_in_every_precision(self, make, shape, dtype):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make(dtype)
        check(model, noise(64, *shape).to(dtype))

    def test_half_precision_inside_of_a_float32_model(self):
        def compute(m, x):
            with torch.autocast("cpu", torch.bfloat16):
                return m.head(m.body(x)).float()

        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(*[p for _ in range(12) for p in (nn.Linear(64, 64), nn.Tanh())])
            model = Net(compute, body=body, head=nn.Linear(64, 10))
        check(model, noise(64, 64))
        model.body.append(Net(lambda m, h: F.dropout(h, 0.5)))
        with pytest.raises(ValueError, match=r"change by chance, first at 'body\.24'"):
            check(model, noise(64, 64))

    @pytest.mark.parametrize("inside", [torch.bfloat16, torch.float32])
    def test_what_half_precision_accounts_for(self, inside):
        def compute(m, x):
            h = m.body(x).to(inside) * (1 + 2**-8 if len(x) == 2 else 1)  # a rounding of its own
            return m.head(m.tanh(h).float())

        model = net(compute, body=lambda: nn.Linear(5, 8), tanh=nn.Tanh, head=lambda: nn.Linear(8, 3))
        if inside == torch.bfloat16:
            check(model, noise(N, 5))
        else:
            with pytest.raises(ValueError, match=r"change with the other .* first in what reaches 'tanh' "):
                check(model, noise(N, 5))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_dropout_is_found_in_every_precision(self, dtype):
        for make, shape in ((convolutions, (3, 16, 16)), (transformer, (9, 32))):
            inner = make(dtype)
            model = Net(lambda m, x: m.inner(F.dropout(x, 0.1)), inner=inner).to(dtype)
            with pytest.raises(ValueError, match="change by chance, first in what reaches 'inner"):
                check(model, noise(8, *shape).to(dtype))

    def test_a_small_output_is_judged_among_the_others(self):
        model = net(lambda m, x: m.head(x), head=lambda: nn.Linear(64, 1))
        x = noise(N, 64)
        with torch.no_grad():
            w = model.head.weight[0]
            x[0] -= w * ((x[0] @ w + model.head.bias) / w.square().sum())  # an output of rounding only
        check(model, x)


class TestTheCheck:
    def test_leaves_inputs_and_model_as_they_were(self):
        model = between(lambda m, h: F.dropout(h))
        model.compute = lambda m, x: m.head(m.body(x.sub_(0.5)))
        x = noise(N, 5)
        check(model, x)
        assert torch.equal(x, noise(N, 5))
        model.compute = lambda m, x: F.dropout(m.head(m.body(x.sub_(0.5))))
        with pytest.raises(ValueError, match="change by chance"):
            check(model, x)
        assert torch.equal(x, noise(N, 5))
        assert hooks_on(model) == 0

    @pytest.mark.parametrize("n", [1, 2, 3, 7])
    def test_few_examples_and_dicts(self, n):
        def run(middle):
            model = net(lambda m, x, scale: m.head(middle(x) * scale), head=lambda: nn.Linear(5, 3))
            given = {"x": noise(n, 5), "scale": torch.ones(n, 1), "labels": torch.zeros(n)}
            check_deterministic(model, given)

        run(torch.tanh)
        for middle in (F.dropout, lambda h: h.softmax(0)):
            with pytest.raises(ValueError, match="`model` must give an example the same outputs in every"):
                run(middle)

    def test_examples_that_must_stay_sorted(self):
        def compute(m, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return m.head(m.cells(packed)[1][0][-1])

        model = net(compute, cells=lambda: nn.LSTM(5, 4, batch_first=True), head=lambda: nn.Linear(4, 3))
        check(model, noise(N, 6, 5), torch.arange(6, 0, -1))

    def test_examples_may_be_sorted_on_the_way(self):
        def compute(m, x, key):
            order = key.argsort(descending=True)
            return m.head(m.body(x[order]))[order.argsort()]

        model = net(compute, body=lambda: nn.Linear(50, 40), head=lambda: nn.Linear(40, 3))
        check(model, noise(N, 50), torch.tensor([1.0, 5, 2, 4, 3, 6]))

    def test_takes_four_passes(self):
        model = net(lambda m, x: m.head(x), head=lambda: nn.Linear(5, 3))
        sizes = []
        model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        check(model, noise(N, 5))
        assert sizes == [3, 3, 2, 2]


class TestAlike:
    def test_infinities_and_nan_in_the_same_places(self):
        a = torch.tensor([1.0, float("inf"), float("nan"), float("-inf")])
        assert are_alike(a, a.clone(), 1e-7)
        for i, other in ((0, 1.1), (1, float("-inf")), (2, 0.0), (0, float("nan")), (3, 5.0)):
            b = a.clone()
            b[i] = other
            assert not are_alike(a, b, 1e-7)

    def test_shapes_complex_numbers_and_zeros(self):
        assert not are_alike(torch.ones(3), torch.ones(3, 1), 1e-7)
        assert are_alike(torch.zeros(3), torch.zeros(3), 1e-7)
        assert not are_alike(torch.zeros(3), torch.full((3,), 1e-30), 1e-7)
        z = torch.tensor([1 + 1j])
        assert are_alike(z, z * (1 + 1e-6), 1e-7)
        assert not are_alike(z, z.conj().resolve_conj(), 1e-7)

    def test_the_scale_may_be_that_of_others(self):
        a, b = torch.tensor([1e-6]), torch.tensor([2e-6])
        assert not are_alike(a, b, 1e-7)
        assert are_alike(a, b, 1e-7, torch.ones(1))

    def test_rounding_is_that_of_the_coarsest_format(self):
        model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
        assert rounding(model) == torch.finfo(torch.float32).eps
        assert rounding(model, torch.ones(1).bfloat16()) == torch.finfo(torch.bfloat16).eps
        assert rounding(nn.Identity(), torch.ones(1).double()) == torch.finfo(torch.float64).eps


class TestLayouts:
    def test_by_the_dimension_that_follows(self):
        x = noise(3, 3, 4)
        assert batch_layout(x, x[[1, 0]], [1, 0], 1e-7, "fc") == Layout(0, "one")
        assert batch_layout(x, x[:, [0, 1]], [0, 1], 1e-7, "fc") == Layout(1, "one")
        y = x.flatten(0, 1)
        assert batch_layout(y, x[[1, 0]].flatten(0, 1), [1, 0], 1e-7, "fc") == Layout(0, "examples first")
        assert batch_layout(y, x[:, [1, 0]].flatten(0, 1), [1, 0], 1e-7, "fc") == Layout(0, "positions first")

    def test_in_the_wrong_order(self):
        x = noise(3, 4)
        with pytest.raises(
            ValueError, match="must give an example the same row in every batch; got others from 'fc'"
        ):
            batch_layout(x, x[:2], [1, 0], 1e-7, "fc")

    def test_spread(self):
        assert [spread(n) for n in (1, 2, 3, 4, 9)] == [[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 2, 3], [0, 4, 8]]
