from __future__ import annotations

import pytest
import torch
from small_nets import Net, names, net, noise, read
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import KNNShapley, Similarity, TracIn
from stride_captum.layers.activations import Tap, default_taps, layer_places, named_taps, recording, to_rows

N = 5


def linear(d_in: int, d_out: int):
    return lambda: nn.Linear(d_in, d_out)


def batch(*inputs: Tensor) -> tuple[Tensor, ...]:
    return (*inputs, torch.zeros(len(inputs[0])))


def chosen(model: nn.Module, *inputs: Tensor) -> tuple[list[Tap], list[Tensor]]:
    """The default taps of a model, and what they give."""
    taps = default_taps(model, batch(*inputs), 4096)
    return taps, read(model, taps, batch(*inputs))[1]


def named(model: nn.Module, layers: list[str], *inputs: Tensor) -> list[Tensor]:
    return read(model, named_taps(model, layers, batch(*inputs)), batch(*inputs))[1]


class TestWhichDimensionCountsTheExamples:
    """Five examples of five steps: sizes do not tell the two apart."""

    x = noise(N, N, 4)

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent_layers_with_time_first(self, kind):
        model = net(
            lambda m, x: m.head(m.cells(m.embed(x).transpose(0, 1))[0][-1]),
            embed=linear(4, 6),
            cells=lambda: kind(6, 3),
            head=linear(3, 2),
        )
        rows = named(model, ["cells", "cells:input"], self.x)
        inner = model.embed(self.x).transpose(0, 1)
        torch.testing.assert_close(rows[0], model.cells(inner)[0].mean(0))
        torch.testing.assert_close(rows[1], inner.mean(0))
        taps, rows = chosen(model, self.x)
        assert names(taps) == ["cells:input", "cells", "head:input"]
        assert [tap.batch_dim for tap in taps] == [1, 1, 0]
        torch.testing.assert_close(rows[1], model.cells(inner)[0].mean(0))

    def test_a_transformer_with_time_first(self):
        model = net(
            lambda m, x: m.head(m.body(m.embed(x).transpose(0, 1)).mean(0)),
            embed=linear(4, 8),
            body=lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
            ),
            head=linear(8, 2),
        )
        (rows,) = named(model, ["body"], self.x)
        torch.testing.assert_close(rows, model.body(model.embed(self.x).transpose(0, 1)).mean(0))
        taps, rows = chosen(model, self.x)
        layer = "body.layers.0."
        assert names(taps)[:3] == [
            f"{layer}self_attn:input",
            f"{layer}linear1:input",
            f"{layer}linear2:input",
        ]
        torch.testing.assert_close(rows[0], model.embed(self.x).mean(1))

    def test_scores_do_not_depend_on_how_many_examples_a_batch_has(self):
        model = net(
            lambda m, x: m.head(m.cells(x.transpose(0, 1))[0][-1]),
            cells=lambda: nn.LSTM(4, 3),
            head=linear(3, 2),
        )
        train = TensorDataset(noise(12, N, 4), torch.arange(12) % 2)
        test = noise(3, N, 4, seed=1), torch.tensor([0, 1, 1])
        of_five, of_three = (
            STRIDE(model, train, layers=["cells"], batch_size=size).influence(test) for size in (5, 3)
        )
        torch.testing.assert_close(of_five, of_three, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_few_examples_are_enough(self, n):
        model = net(
            lambda m, x: m.head(m.cells(x.transpose(0, 1))[0][-1]),
            cells=lambda: nn.LSTM(4, 3),
            head=linear(3, 2),
        )
        (rows,) = named(model, ["cells"], self.x[:n])
        torch.testing.assert_close(rows, model.cells(self.x[:n].transpose(0, 1))[0].mean(0))

    @pytest.mark.parametrize("first", ["examples", "positions"])
    def test_several_rows_per_example(self, first):
        def compute(m, x):
            if first == "examples":
                return m.head(m.bag(x.flatten(0, 1)).relu().unflatten(0, (-1, N)).mean(1))
            return m.head(m.bag(x.transpose(0, 1).flatten(0, 1)).relu().unflatten(0, (N, -1)).mean(0))

        model = net(compute, bag=linear(4, 3), head=linear(3, 2))
        (tap,) = named_taps(model, ["bag"], batch(self.x))
        assert tap.rows == f"{first} first"
        for n in (1, N):
            (rows,) = read(model, [tap], batch(self.x[:n]))[1]
            torch.testing.assert_close(rows, model.bag(self.x[:n]).mean(1))
        if first == "examples":  # "bag" reads the bags as they were given
            assert names(chosen(model, self.x)[0]) == ["head:input"]

    def test_rows_that_are_alike_do_not_show_whose_they_are(self):
        model = net(
            lambda m, x: m.head(m.bag(x.flatten(0, 1)).unflatten(0, (-1, N)).mean(1)), bag=linear(4, 3)
        )
        model.head = nn.Linear(3, 2)
        with pytest.raises(
            ValueError,
            match="`layers` must show which rows belong to an example; got 5 rows for each from 'bag'",
        ):
            named_taps(model, ["bag"], batch(self.x[:1, :1].expand(N, N, 4)))

    @pytest.mark.parametrize(
        ("compute", "shapes"),
        [
            (lambda h: h.sum(0), r"\(4,\) for 3 examples, \(4,\) for 2"),
            (lambda h: h @ h.T, r"\(3, 3\) for 3 examples, \(2, 2\) for 2"),
            (lambda h: h[h > 0][:, None], r"\(\d+, 1\) for 3 examples, \(\d+, 1\) for 2"),
        ],
        ids=["none", "two", "varying"],
    )
    def test_no_such_dimension_or_two(self, compute, shapes):
        model = net(lambda m, x: (m.odd(x), m.head(x))[1], odd=lambda: Net(lambda _, h: compute(h)))
        model.head = nn.Linear(4, 2)
        with pytest.raises(
            ValueError,
            match=rf"`layers` must give one row per example; got the shapes {shapes} from 'odd'. Name",
        ):
            named_taps(model, ["odd"], batch(self.x[:, 0]))

    def test_a_module_that_is_called_once_for_each_example(self):
        model = net(lambda m, x: torch.stack([m.head(row) for row in x]), head=linear(4, 2))
        with pytest.raises(
            ValueError,
            match="must name submodules that run on whole batches; got 3 runs of 'head' for 3 examp",
        ):
            named_taps(model, ["head"], batch(self.x[:, 0]))

    @pytest.mark.parametrize("key", [[1.0, 5, 2, 4, 3], [5.0, 4, 3, 2, 1]], ids=["mixed", "sorted"])
    def test_examples_that_are_sorted_on_the_way(self, key):
        def compute(m, x, key):
            order = key.argsort(descending=True)
            return m.head(m.sorted(x[order]))[order.argsort()]

        model = net(compute, sorted=linear(4, 3), head=linear(3, 2))
        inputs = self.x[:, 0], torch.tensor(key)
        with pytest.raises(
            ValueError,
            match="`layers` must give an example the same row in every batch; got others from 'sorted' when",
        ):
            named_taps(model, ["sorted"], batch(*inputs))
        with pytest.raises(
            ValueError, match="got others from 'head:input' when the examples come in another"
        ):
            default_taps(model, batch(*inputs), 4096)

    @pytest.mark.parametrize("sort", [False, True])
    def test_packed_sequences_are_averaged_over_their_own_steps(self, sort):
        def compute(m, x, lengths):
            packed = pack_padded_sequence(m.embed(x), lengths, batch_first=True, enforce_sorted=sort)
            return m.head(m.cells(packed)[1][0][-1])

        model = net(
            compute, embed=linear(4, 4), cells=lambda: nn.LSTM(4, 3, batch_first=True), head=linear(3, 2)
        )
        lengths = torch.tensor([5, 4, 4, 2, 1] if sort else [2, 5, 1, 4, 3])
        taps, _ = chosen(model, self.x, lengths)
        assert names(taps) == ["cells:input", "cells", "head:input"]
        inside, outside = named(model, ["cells:input", "cells"], self.x, lengths)
        for i, length in enumerate(lengths):
            steps = model.embed(self.x[i : i + 1, :length])
            torch.testing.assert_close(inside[i], steps.mean((0, 1)))
            torch.testing.assert_close(outside[i], model.cells(steps)[0].mean((0, 1)))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_tensors_are_averaged_over_their_own_steps(self):
        def compute(m, x, lengths):
            padding = torch.arange(x.shape[1]) >= lengths[:, None]
            return m.head(m.body(m.embed(x), src_key_padding_mask=padding)[:, 0])

        model = net(
            compute,
            embed=linear(4, 8),
            body=lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
            head=linear(8, 2),
        )
        lengths = torch.tensor([5, 4, 4, 2, 1])
        taps = default_taps(model, batch(self.x, lengths), 4096)
        place = names(taps).index("body.layers.0.linear1:input")
        together, rows = read(model, taps, batch(self.x, lengths))
        for i, length in enumerate(lengths):
            alone, own = read(model, taps, batch(self.x[i : i + 1, :length], lengths[i : i + 1]))
            torch.testing.assert_close(together[i], alone[0])
            torch.testing.assert_close(rows[place][i], own[place][0])


class TestWhichDimensionHoldsTheChannels:
    def test_a_relu_or_block_behind_one_dimensional_convolutions(self):
        model = net(
            lambda m, x: m.head(m.block(m.relu(m.conv(x))).mean(2)),
            conv=lambda: nn.Conv1d(3, 4, 3),
            relu=nn.ReLU,
            block=lambda: Net(lambda m, h: h + m.conv(h).tanh(), conv=nn.Conv1d(4, 4, 3, padding=1)),
            head=linear(4, 2),
        )
        x = noise(N, 3, 10)
        for name, wanted in (("relu", model.conv(x).relu()), ("block", model.block(model.conv(x).relu()))):
            torch.testing.assert_close(named(model, [name], x)[0], to_rows(wanted, 1, 4))

    def test_blocks_of_a_network_with_channels_last(self):
        model = net(
            lambda m, x: m.head(m.block(m.patches(x).movedim(1, -1)).mean((1, 2))),
            patches=lambda: nn.Conv2d(3, 4, 2, 2),
            block=lambda: Net(lambda m, h: h + m.fc(m.norm(h)), norm=nn.LayerNorm(4), fc=nn.Linear(4, 4)),
            head=lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
        )
        x = noise(N, 3, 12, 12)
        wanted = model.patches(x).movedim(1, -1)
        assert torch.equal(named(model, ["block.norm:input"], x)[0], wanted.flatten(1, 2).mean(1))
        (rows,) = named(model, ["block:input"], x)  # which the LayerNorm reads
        assert torch.equal(rows, wanted.flatten(1, 2).mean(1))
        with pytest.raises(
            ValueError,
            match=r"must name submodules that show which dimension holds the channels; got the shape "
            r"\(3, 6, 6, 4\) from 'block', in a model with channels first and last",
        ):
            named(model, ["block"], x)

    def test_token_sequences_without_a_sign_of_either(self):
        model = net(lambda m, x: m.id(x).mean(1), id=nn.Identity)
        assert torch.equal(named(model, ["id"], noise(N, 6, 4))[0], noise(N, 6, 4).mean(1))


class TwoPhase(nn.Module):
    """`transformers.pytorch_utils.Conv1D`: a Linear whose weight is `(in, out)`."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x):
        return (x.flatten(0, -2) @ self.weight + self.bias).unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    """Weights as parameters of a module that has a norm and a dropout as well, as in XLNet."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.norm, self.dropout = nn.Parameter(torch.randn(d, d)), nn.LayerNorm(d), nn.Dropout()

    def forward(self, x):
        return self.dropout(self.norm(x + x @ self.weight))


class TestWeightLayers:
    x = noise(N, 3, 6)

    @pytest.mark.parametrize("kind", [TwoPhase, Attention], ids=["GPT-2", "XLNet"])
    def test_of_the_users_own(self, kind):
        own = (lambda: TwoPhase(6, 6)) if kind is TwoPhase else (lambda: Attention(6))
        model = net(
            lambda m, x: m.head(m.own(m.embed(x).tanh()).mean(1)),
            embed=linear(6, 6),
            own=own,
            head=linear(6, 2),
        )
        taps, rows = chosen(model, self.x)
        assert names(taps) == ["own:input", "head:input"]
        torch.testing.assert_close(rows[0], model.embed(self.x).tanh().mean(1))

    @pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
    def test_with_a_parametrized_weight(self, wrap):
        model = net(
            lambda m, x: m.own(m.embed(x).tanh()), embed=linear(6, 6), own=lambda: wrap(TwoPhase(2, 6))
        )
        assert names(chosen(model, self.x[:, 0])[0]) == ["embed:input", "own:input"]

    def test_of_a_single_channel_or_logit(self):
        model = net(
            lambda m, x: m.head(m.second(m.first(x).relu()).relu().flatten(1)),
            first=lambda: nn.Conv3d(1, 1, 2),
            second=lambda: nn.Conv3d(1, 1, (2, 1, 1)),
            head=linear(27 - 9, 1),
        )
        taps, rows = chosen(model, noise(N, 1, 4, 4, 4))
        assert names(taps) == ["second:input", "head:input"]
        torch.testing.assert_close(rows[0], to_rows(model.first(noise(N, 1, 4, 4, 4)).relu(), 3, 2))

    def test_class_tokens_and_scales_are_no_matrices(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale, self.token = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.ones(1, 1, 6))

            def forward(self, x):
                return x * self.scale[:, 0, 0] * self.token[0]

        model = net(
            lambda m, x: m.head(m.scaled(m.embed(x))), embed=linear(6, 6), scaled=Scaled, head=linear(6, 2)
        )
        assert names(chosen(model, self.x[:, 0])[0]) == ["embed:input", "head:input"]

    def test_transposed_convolutions(self):
        model = net(
            lambda m, x: m.head(m.up(m.conv(x).relu()).relu().mean((2, 3))),
            conv=lambda: nn.Conv2d(3, 4, 3),
            up=lambda: nn.ConvTranspose2d(4, 5, 2),
            head=linear(5, 2),
        )
        x = noise(N, 3, 10, 10)
        taps, rows = chosen(model, x)
        assert names(taps) == ["up:input", "head:input"]
        torch.testing.assert_close(rows[0], to_rows(model.conv(x).relu(), 2, 4))

    def test_bilinear_layers_read_two_inputs(self):
        model = net(
            lambda m, x: m.both(m.left(x).relu(), input2=m.right(x).relu()),
            left=linear(6, 4),
            right=linear(6, 5),
            both=lambda: nn.Bilinear(4, 5, 2),
        )
        taps, rows = chosen(model, self.x[:, 0])
        assert names(taps) == ["left:input", "both:input"]
        x = self.x[:, 0]
        torch.testing.assert_close(rows[1], torch.cat([model.left(x).relu(), model.right(x).relu()], 1))

    def test_attention_reads_queries_and_keys(self):
        model = net(
            lambda m, x: m.head(m.attend(m.embed(x), m.memory(x), m.memory(x))[0].mean(0)),
            embed=linear(6, 4),
            memory=linear(6, 4),
            attend=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            head=linear(4, 2),
        )
        model.compute = lambda m, x: (
            lambda keys: m.head(m.attend(m.embed(x), keys, keys, need_weights=False)[0].mean(1))
        )(m.memory(x))
        taps, rows = chosen(model, self.x)
        assert names(taps) == ["attend:input", "head:input"]
        torch.testing.assert_close(rows[0], torch.cat([model.embed(self.x), model.memory(self.x)], 2).mean(1))

    def test_embeddings_read_no_features(self):
        model = net(
            lambda m, x: m.head(m.table(x).mean(1)), table=lambda: nn.Embedding(50, 6), head=linear(6, 2)
        )
        assert names(chosen(model, torch.arange(N * 3).reshape(N, 3))[0]) == ["head:input"]
        with pytest.raises(
            ValueError, match=r"must give floating-point numbers; got torch.int64 from 'table:inp"
        ):
            named(model, ["table:input"], torch.arange(N * 3).reshape(N, 3))

    def test_the_weights_of_the_model_itself(self):
        model = net(lambda m, x: x @ m.weight, weight=lambda: nn.Parameter(noise(6, 2)))
        taps, rows = chosen(model, self.x[:, 0])
        assert names(taps) == [":input"]
        assert torch.equal(rows[0], self.x[:, 0])
        assert layer_places(model, [":input"]) == [("", True)]

    def test_second_images_are_pixels_too(self):
        model = net(
            lambda m, a, b: m.head(torch.cat([m.left(a).mean((2, 3)), m.right(b).mean((2, 3))], 1)),
            left=lambda: nn.Conv2d(3, 4, 3),
            right=lambda: nn.Conv2d(1, 4, 3),
            head=linear(8, 2),
        )
        assert names(chosen(model, noise(N, 3, 8, 8), noise(N, 1, 9, 9))[0]) == ["head:input"]

    def test_a_layer_that_returns_the_outputs_is_no_feature(self):
        model = net(lambda m, x: m.cell(m.embed(x)), embed=linear(6, 4), cell=lambda: nn.RNNCell(4, 2))
        assert names(chosen(model, self.x[:, 0])[0]) == ["embed:input", "cell:input"]


class TestUnreadWeights:
    x = noise(N, 6)

    def test_are_named_once_where_they_are_many(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = (nn.Parameter(torch.randn(3, 6, 6)) for _ in range(2))
                self.router = nn.Linear(6, 3)

            def forward(self, x):
                h = torch.einsum("nd,edk->nek", x, self.first).relu()
                h = torch.einsum("nek,ekd->ned", h, self.second)
                return (self.router(x).softmax(1)[..., None] * h).sum(1)

        model = net(
            lambda m, x: m.head(m.experts(m.embed(x).relu())),
            embed=linear(6, 6),
            experts=Experts,
            head=linear(6, 2),
        )
        with pytest.warns(
            UserWarning,
            match=r"The default layers leave out 77% of the weights of `model`: no submodule shows, in one "
            r"row per example, what 'experts.first', 'experts.second' apply to. Name submodules in `layers`",
        ) as warned:
            taps = default_taps(model, batch(self.x), 4096)
        assert len(warned) == 1
        assert names(default_taps(model, batch(self.x), 4096, penultimate=True)) == ["head:input"]
        assert names(taps) == ["embed:input", "experts.router:input", "head:input"]

    def test_of_a_module_with_several_matrices_only_the_first_is_seen(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                for i in range(5):
                    self.register_parameter(f"w{i}", nn.Parameter(torch.randn(6, 6)))

            def forward(self, x):
                return (((x @ self.w0).relu() @ self.w1).relu() @ self.w2).relu() @ self.w3 @ self.w4

        with pytest.warns(UserWarning, match="leave out 80% of the .* 'w1', 'w2', 'w3' and 1 more apply to"):
            default_taps(Functional(), batch(self.x), 4096)

    def test_embeddings_norms_and_unused_layers_do_not_count(self, recwarn):
        model = net(
            lambda m, x: m.head(m.norm(m.table(x).mean(1))),
            table=lambda: nn.Embedding(1000, 6),
            norm=lambda: nn.LayerNorm(6),
            unused=linear(90, 90),
            head=linear(6, 2),
        )
        chosen(model, torch.arange(N * 3).reshape(N, 3))
        assert not recwarn.list


class TestModulesThatRunSeveralTimes:
    x, other = noise(N, 4), noise(N, 4, seed=1)

    def test_each_run_has_columns_of_its_own(self):
        model = net(
            lambda m, a, b: m.head(torch.cat([m.twin(a).relu(), m.twin(b).relu()], 1)),
            twin=linear(4, 3),
            head=linear(6, 2),
        )
        (rows,) = named(model, ["twin"], self.x, self.other)
        torch.testing.assert_close(rows, torch.cat([model.twin(self.x), model.twin(self.other)], 1))
        taps, rows = chosen(model, self.x, self.other)
        assert [(str(tap), tap.parts, tap.width) for tap in taps] == [
            ("twin:input", 2, 8),
            ("head:input", 1, 6),
        ]
        assert torch.equal(rows[0], torch.cat([self.x, self.other], 1))

    def test_of_different_widths_and_kinds(self):
        model = net(
            lambda m, x: m.head(m.relu(m.fc(m.relu(m.conv(x)).flatten(1)))),
            conv=lambda: nn.Conv2d(1, 2, 3),
            fc=linear(72, 5),
            relu=nn.ReLU,
            head=linear(5, 2),
        )
        x = noise(N, 1, 8, 8)
        first = model.conv(x).relu()
        (rows,) = named(model, ["relu"], x)
        torch.testing.assert_close(
            rows, torch.cat([to_rows(first, 2, 4), model.fc(first.flatten(1)).relu()], 1)
        )

    def test_recurrent_loops_are_averaged_over_any_number_of_steps(self):
        def compute(m, x):
            h = x.new_zeros(len(x), 3)
            for step in x.unbind(1):
                h = m.cell(step, h)
            return m.head(h)

        model = net(compute, cell=lambda: nn.GRUCell(4, 3), head=linear(3, 2))
        x = noise(N, 9, 4)
        taps = named_taps(model, ["cell:input", "cell"], batch(x))
        assert [tap.parts for tap in taps] == [0, 0]
        assert names(chosen(model, x)[0]) == ["cell:input", "cell", "head:input"]
        for steps in (9, 6, 2):
            inside, outside = read(model, taps, batch(x[:, :steps]))[1]
            torch.testing.assert_close(inside, x[:, :steps].mean(1))
            h, states = x.new_zeros(N, 3), []
            for t in range(steps):
                h = model.cell(x[:, t], h)
                states.append(h)
            torch.testing.assert_close(outside, torch.stack(states).mean(0))

    def test_another_number_of_runs_than_before(self):
        model = net(
            lambda m, x: m.head(sum(m.step(s) for s in x.unbind(1))), step=linear(4, 3), head=linear(3, 2)
        )
        taps = named_taps(model, ["step"], batch(noise(N, 2, 4)))
        with pytest.raises(
            ValueError,
            match=r"`layers` must name submodules that run equally often in every batch; got 3 runs of "
            r"'step' instead of 2. Name a layer that runs once a batch.",
        ):
            read(model, taps, batch(noise(N, 3, 4)))

    def test_tensors_that_do_not_go_together(self):
        def compute(m, x):
            for d in range(1, 6):
                m.odd(x[:, :d])
            return m.head(x)

        model = net(compute, odd=nn.Identity, head=linear(6, 2))
        with pytest.raises(
            ValueError,
            match=r"must name submodules that run on tensors of one kind; got the shapes \(3, 1\), \(3, 2\), "
            r"\(3, 3\) from 'odd', which runs 5 times",
        ):
            named_taps(model, ["odd"], batch(noise(N, 6)))
        model.compute = lambda m, x: (m.odd(x[..., None]), m.odd(x[..., None, None]), m.head(x))[2]
        with pytest.raises(
            ValueError, match=r"of one kind; got the shapes \(3, 6, 1\), \(3, 6, 1, 1\) from 'odd'"
        ):
            named_taps(model, ["odd"], batch(noise(N, 6)))
        model.compute = lambda m, x: (m.odd(x), m.odd(x.T), m.head(x))[2]
        with pytest.raises(
            ValueError, match=r"count examples in the same dimension .* got the dimensions \[0, 1\]"
        ):
            named_taps(model, ["odd"], batch(noise(N, 6)))


class TestLayersThatGiveNoFeatures:
    @pytest.mark.parametrize(
        ("compute", "sentence"),
        [
            (lambda h: h.argmax(1), "give floating-point numbers; got torch.int64 from 'odd'"),
            (lambda h: h > 0, "give floating-point numbers; got torch.bool from 'odd'"),
            (torch.fft.fft, "give floating-point numbers; got torch.complex64 from 'odd'"),
            (
                lambda h: h.sum(),
                "give one row per example; got a single number from 'odd'. Name a layer before",
            ),
            (lambda h: h.to_sparse(), "give dense tensors; got the layout torch.sparse_coo from 'odd'"),
            (lambda h: h[:, :0], r"give at least one feature per example; got the shape \(3, 0\) from 'odd'"),
            (
                lambda h: {"h": h},
                r"give a tensor \('odd'\); got dict. Name a submodule that returns a tensor",
            ),
            (lambda h: ({"h": h}, h), r"give a tensor \('odd'\); got dict"),
            (lambda h: None, r"give a tensor \('odd'\); got NoneType"),
        ],
    )
    def test_are_refused_by_name(self, compute, sentence):
        model = net(
            lambda m, x: (m.odd(x), m.head(x))[1], odd=lambda: Net(lambda _, h: compute(h)), head=linear(4, 2)
        )
        with pytest.raises((TypeError, ValueError), match="`layers` must " + sentence):
            named_taps(model, ["odd"], batch(noise(N, 4)))

    def test_and_left_out_by_default(self):
        class Odd(nn.Linear):
            def forward(self, x):
                return super().forward(x.to_dense() if x.is_sparse else x)

        model = net(
            lambda m, x: m.head(m.sparse(x.to_sparse()) + m.constant(torch.ones(4))),
            sparse=lambda: Odd(4, 3),
            constant=linear(4, 3),
            head=linear(3, 2),
        )
        with pytest.warns(
            UserWarning, match=r"leave out 80% .* what 'sparse.weight', 'constant.weight' apply"
        ):
            assert names(default_taps(model, batch(noise(N, 4)), 4096)) == ["head:input"]

    def test_nan_is_no_other_value(self):
        model = net(lambda m, x: m.head(m.log(x)), log=lambda: Net(lambda _, h: h.log()), head=linear(4, 2))
        x = noise(N, 4)
        assert torch.equal(named(model, ["log"], x)[0].isnan(), x < 0)
        train = TensorDataset(x, torch.arange(N) % 2)
        with pytest.raises(ValueError, match=r"`(train_dataset|model)` must .* NaN"):
            STRIDE(model, train, layers=["log"]).fit()


class TestWhatLayersMayBe:
    model = net(
        lambda m, x: m.wrapped.module.head(m.fc(x)),
        fc=linear(4, 3),
        wrapped=lambda: nn.ModuleDict({"module": nn.ModuleDict({"head": nn.Linear(3, 2)})}),
    )

    def test_modules_instead_of_names(self):
        with pytest.raises(
            TypeError,
            match=r"`layers` must hold names of submodules; got Linear. Write 'fc' for what it returns, or "
            r"'fc:input' for what it reads.",
        ):
            layer_places(self.model, [self.model.fc])
        with pytest.raises(
            TypeError, match=r"`layers` must be a list of submodule names; got Linear. Write layers=\['fc'\]."
        ):
            layer_places(self.model, self.model.fc)
        with pytest.raises(TypeError, match=r"must hold names of submodules of `model`; got Linear\.$"):
            layer_places(self.model, [nn.Linear(4, 3)])

    @pytest.mark.parametrize("layers", [{"fc"}, {"fc": 1}, 3, iter(["fc"])])
    def test_no_list(self, layers):
        with pytest.raises(TypeError, match=r"`layers` must be a list of submodule names; got \w+\.$"):
            layer_places(self.model, layers)

    def test_no_names(self):
        with pytest.raises(TypeError, match="`layers` must hold names of submodules of `model`; got int"):
            layer_places(self.model, [0])

    def test_one_place_twice(self):
        assert layer_places(self.model, ["fc", "fc:input"]) == [("fc", False), ("fc", True)]
        model = net(lambda m, x: m.again(m.fc(x)), fc=linear(4, 4))
        model.again = model.fc
        for layers in (["fc", "fc"], ["fc", "again"]):
            with pytest.raises(ValueError, match=f"must name every place once; got '{layers[1]}' twice"):
                layer_places(model, layers)

    def test_a_suffix_that_does_not_exist(self):
        with pytest.raises(
            ValueError, match=r"must name submodules of `model`; got 'fc:output'. The output is 'fc'."
        ):
            layer_places(self.model, ["fc:output"])

    def test_the_names_in_front_of_which_wrappers_put_theirs(self):
        assert layer_places(self.model, ["wrapped.head:input"]) == [("wrapped.module.head", True)]
        wrapped = nn.DataParallel(self.model, device_ids=[])
        assert layer_places(wrapped, ["fc"]) == [("module.fc", False)]

    def test_a_layer_that_runs_in_training_only(self):
        model = net(lambda m, x: m.fc(m.noise(x) if m.training else x), noise=nn.Dropout, fc=linear(4, 2))
        with pytest.raises(
            ValueError,
            match=r"run in the forward pass; got 'noise'. It must be called in eval mode, as `module\(x\)`",
        ):
            named_taps(model, ["noise"], batch(noise(N, 4)))


def test_a_module_with_two_names_is_read_under_either():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = shared, shared, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(x)))

    model, data = Twice().eval(), TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
    scores = [STRIDE(model, data, layers=[name]).influence(data[:2]) for name in ("first", "second")]
    assert torch.equal(*scores)


class TestLayersThatGiveTheOutputs:
    def model(self, forward=lambda m, x: m.fc3(m.fc1(x).relu())):
        return net(forward, fc1=linear(4, 3), fc3=linear(3, 2))

    @pytest.mark.parametrize("method", [STRIDE, Similarity, KNNShapley])
    def test_are_refused_with_what_the_layer_reads(self, method):
        data = TensorDataset(noise(N, 4), torch.arange(N) % 2)
        with pytest.raises(
            ValueError,
            match=r"`layers` must name layers that give features, not the outputs of the model; got 'fc3', "
            r"whose values are these outputs. Write 'fc3:input' for what it reads",
        ):
            method(self.model(), data, layers=["fc1", "fc3"]).fit()
        assert method(self.model(), data, layers=["fc3:input"]).fit().n_train_ == N

    @pytest.mark.parametrize(
        "forward",
        [
            lambda m, x: m.fc3(m.fc1(x).relu()).squeeze(-1),
            lambda m, x: {"logits": m.fc3(m.fc1(x).relu())},
        ],
    )
    def test_are_known_in_other_clothes(self, forward):
        with pytest.raises(ValueError, match="got 'fc3', whose values are these outputs"):
            named_taps(self.model(forward), ["fc3"], batch(noise(N, 4)))

    def test_a_layer_of_which_the_outputs_are_a_part_is_read(self):
        model = net(lambda m, x: m.wide(x)[:, :2], wide=linear(4, 3))
        assert named_taps(model, ["wide"], batch(noise(N, 4)))[0].width == 3

    def test_gradient_methods_take_the_parameters_of_the_layer(self):
        data = TensorDataset(noise(N, 4), torch.arange(N) % 2)
        assert TracIn(self.model(), data, layers=["fc3"]).influence(data[:2]).shape == (2, N)


class TestOtherBatches:
    def test_maps_of_another_size(self):
        model = net(
            lambda m, x: m.head(F.adaptive_avg_pool2d(m.conv(x), 1).flatten(1)),
            conv=lambda: nn.Conv2d(1, 2, 3),
            head=linear(2, 2),
        )
        taps = named_taps(model, ["conv"], batch(noise(N, 1, 9, 9)))
        assert read(model, taps, batch(noise(N, 1, 12, 7)))[1][0].shape == (N, 32)
        with pytest.raises(
            ValueError,
            match=r"`layers` must give 32 features per example in every batch; got 8 from 'conv'. Bring all",
        ):
            read(model, taps, batch(noise(N, 1, 4, 4)))

    def test_another_number_of_dimensions(self):
        model = net(lambda m, x: m.id(x).flatten(1)[:, :2], id=nn.Identity)
        taps = named_taps(model, ["id"], batch(noise(N, 3, 4, 4)))
        with pytest.raises(
            ValueError,
            match=r"must give maps with 2 dimensions in every batch; got the shape \(5, 3, 4\) from 'id'",
        ):
            read(model, taps, batch(noise(N, 3, 4)))

    def test_taps_do_not_depend_on_which_examples_come_first(self):
        model = net(
            lambda m, x: m.head(m.conv(x).relu().mean((2, 3))),
            conv=lambda: nn.Conv2d(1, 3, 3),
            head=linear(3, 2),
        )
        x = noise(9, 1, 6, 6)
        expected = default_taps(model, batch(x), 4096)
        for order in (torch.arange(8, -1, -1), torch.tensor([4, 4, 4, 4])):
            assert default_taps(model, batch(x[order]), 4096) == expected

    def test_a_layer_that_runs_only_now_and_then(self):
        model = net(lambda m, x: m.head(m.rare(x) if len(x) < 5 else x), rare=linear(4, 4), head=linear(4, 2))
        taps = named_taps(model, ["rare"], batch(noise(N, 4)))
        with pytest.raises(ValueError, match="must name submodules that run in the forward pass; got 'rare'"):
            read(model, taps, batch(noise(N, 4)))

    def test_a_batch_that_fails_leaves_nothing_to_the_next(self):
        model = net(
            lambda m, x: (m.fc(x), m.head(x if x.isfinite().all() else None))[1],
            fc=linear(4, 3),
            head=linear(4, 2),
        )
        x = noise(N, 4)
        taps = named_taps(model, ["fc"], batch(x))
        with recording(model, taps) as run:
            with pytest.raises(TypeError):
                run(batch(x / 0))
            torch.testing.assert_close(run(batch(x))[1][0], model.fc(x))

    def test_lists_beside_the_tensors_go_with_the_examples(self):
        model = net(
            lambda m, x, words: m.head(x * torch.tensor([[len(w)] for w in words])), head=linear(4, 2)
        )
        given = noise(4, 4), ["a", "bb", "ccc", "dddd"], torch.zeros(4)
        (rows,) = read(model, default_taps(model, given, 4096), given)[1]
        assert torch.equal(rows, given[0] * torch.arange(1, 5)[:, None])
