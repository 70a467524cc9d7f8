from __future__ import annotations

import weakref

import pytest
import torch
from planted import N_CLASSES, BatchNormCNN, HuggingFaceLike, ListOfDicts, built, trained
from torch import Tensor, nn
from torch.nn import functional as F

from stride_captum import STRIDE, Features
from stride_captum.evaluation.tasks.networks import cifar10_cnn, mnist_mlp
from stride_captum.layers.activations import Tap, default_taps, named_taps, recording, to_rows


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def names(taps: list[Tap]) -> list[str]:
    return [str(tap) for tap in taps]


@torch.no_grad()
def read(model: nn.Module, taps: list[Tap], batch: object) -> tuple[Tensor, list[Tensor]]:
    with recording(model, taps) as run:
        return run(batch)


@torch.no_grad()
def choose(model: nn.Module, batch: object, max_width: int = 4096, penultimate: bool = False) -> list[Tap]:
    return default_taps(model.eval(), batch, max_width, penultimate)


class TestRows:
    def test_maps_are_pooled_to_the_mean_of_their_quarters(self):
        x = noise(2, 3, 8, 8).double()
        wanted = torch.stack(
            [
                torch.stack([x[:, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for j in range(4)], 1)
                for c in range(3)
                for i in range(4)
            ],
            1,
        ).flatten(1)
        torch.testing.assert_close(to_rows(x, 2, 4), wanted)

    @pytest.mark.parametrize("spatial", [1, 2, 3])
    def test_maps_of_every_dimension_and_small_ones(self, spatial):
        x = noise(2, 5, *[8, 6, 5][:spatial])
        assert to_rows(x, spatial, 4).shape == (2, 5 * 4**spatial)
        assert torch.equal(to_rows(x, spatial, 9), x.flatten(1))
        torch.testing.assert_close(to_rows(x, spatial, 1), x.flatten(2).mean(2))

    def test_tokens_are_averaged_and_vectors_kept(self):
        x = noise(2, 4, 3, 5)
        torch.testing.assert_close(to_rows(x, 0, 1), x.mean((1, 2)))
        assert torch.equal(to_rows(x[:, 0, 0], 0, 1), x[:, 0, 0])
        assert to_rows(torch.ones(3), 0, 1).shape == (3, 1)

    def test_examples_in_another_dimension_and_padding(self):
        x, mask = noise(4, 2, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        torch.testing.assert_close(to_rows(x, 0, 1, batch_dim=1), x.mean(0))
        wanted = torch.stack([x[:2, 0].mean(0), x[:, 1].mean(0)])
        torch.testing.assert_close(to_rows(x, 0, 1, 1, mask), wanted)
        x[2:, 0] = float("nan")
        torch.testing.assert_close(to_rows(x, 0, 1, 1, mask), wanted)
        assert torch.equal(to_rows(x[:3], 0, 1, 1, mask)[1], x[:3].mean(0)[1])  # the mask is of other tokens

    def test_half_precision_becomes_single_and_double_stays(self):
        assert to_rows(noise(2, 3).bfloat16(), 0, 1).dtype == torch.float32
        assert to_rows(noise(2, 3).double(), 0, 1).dtype == torch.float64


class TestDefaultTaps:
    @pytest.mark.parametrize("shape", [(784,), (1, 28, 28)])
    def test_the_mlp_of_the_paper_gives_its_flat_input_and_both_hidden_layers(self, shape):
        model, x = built(mnist_mlp), noise(3, *shape)
        taps = choose(model, (x, None))
        assert names(taps) == ["fc1:input", "fc2:input", "fc3:input"]
        outputs, rows = read(model, taps, (x, None))
        h1 = model.fc1(x.flatten(1)).relu()
        for row, wanted in zip(rows, [x.flatten(1), h1, model.fc2(h1).relu()], strict=True):
            torch.testing.assert_close(row, wanted)
        torch.testing.assert_close(outputs, model(x))

    def test_the_cnn_of_the_paper_gives_pooled_maps_and_no_pixels(self):
        model, x = built(cifar10_cnn).eval(), noise(3, 3, 32, 32)
        taps = choose(model, (x, None))
        assert names(taps) == ["conv2:input", "fc1:input", "fc2:input"]
        assert [tap.width for tap in taps] == [512, 1024, 512]
        _, rows = read(model, taps, (x, None))
        c1 = model.bn1(model.conv1(x)).relu()
        torch.testing.assert_close(rows[0], F.adaptive_avg_pool2d(F.max_pool2d(c1, 2), 4).flatten(1))
        assert [row.shape for row in rows] == [(3, tap.width) for tap in taps]

    def test_penultimate_is_what_the_last_weight_layer_reads(self):
        assert names(choose(cifar10_cnn(), (noise(2, 3, 32, 32), None), penultimate=True)) == ["fc2:input"]

    @pytest.mark.slow
    @pytest.mark.parametrize("max_width", [4096, 3840, 2000, 700, 1])
    def test_resnet18_fits_the_width_and_always_keeps_the_last_tap(self, max_width):
        torchvision = pytest.importorskip("torchvision")
        model, x = built(torchvision.models.resnet18).eval(), noise(2, 3, 32, 32)
        taps = choose(model, (x, None), max_width)
        assert sum(tap.width for tap in taps) <= max(max_width, 512)
        assert names(taps)[-1] == "fc:input"
        assert "conv1:input" not in names(taps)  # the pixels
        _, rows = read(model, taps, (x, None))
        assert [row.shape[1] for row in rows] == [tap.width for tap in taps]
        if max_width == 4096:
            assert len(taps) >= 12
            assert not any("downsample" in name for name in names(taps))  # reads what conv1 reads

    @pytest.mark.slow
    def test_vit_b_16_gives_token_means_and_no_pixels(self):
        torchvision = pytest.importorskip("torchvision")
        model = built(lambda: torchvision.models.vit_b_16(image_size=32)).eval()
        x = noise(2, 3, 32, 32)
        taps = choose(model, (x, None))
        assert names(taps)[-1] == "heads.head:input"
        assert {tap.spatial for tap in taps} == {0}
        assert 3 * 768 <= sum(tap.width for tap in taps) <= 4096
        outputs, rows = read(model, taps, (x, None))
        torch.testing.assert_close(outputs, model(x))
        torch.testing.assert_close(model.heads(rows[-1]), outputs)
        block = model.encoder.layers[11]
        assert names(taps)[-2] == "encoder.layers.encoder_layer_11.mlp.0:input"
        seen = {}
        handle = block.ln_2.register_forward_hook(lambda module, args, output: seen.update(ln=output))
        model(x)
        handle.remove()
        torch.testing.assert_close(rows[-2], seen["ln"].mean(1))

    def test_functional_activations_are_read_behind_them(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

            def forward(self, x):
                return self.c(torch.tanh(self.b(F.gelu(self.a(x)))))

        model, x = built(Functional), noise(3, 4)
        taps = choose(model, (x, None))
        assert names(taps) == ["a:input", "b:input", "c:input"]
        _, rows = read(model, taps, (x, None))
        torch.testing.assert_close(rows[1], F.gelu(model.a(x)))
        torch.testing.assert_close(rows[2], model.b(rows[1]).tanh())

    def test_token_ids_are_no_features(self):
        taps = choose(built(HuggingFaceLike), ListOfDicts(2)[:])
        assert names(taps) == ["encoder:input", "classifier:input"]

    def test_normalised_pixels_are_pixels_and_states_of_the_same_shape_are_not(self):
        class Normalizing(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

            def forward(self, x):
                return self.c(self.b(self.a(x / 255).relu()).relu().mean((2, 3)))

        assert names(choose(Normalizing(), (noise(2, 2, 6, 6), None))) == ["b:input", "c:input"]

    def test_layers_that_read_the_same_tensor_count_once_unless_it_was_written_to(self):
        class Branches(nn.Module):
            def __init__(self, write: bool):
                super().__init__()
                self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)
                self.c, self.d, self.write = nn.Linear(5, 5), nn.Linear(5, 3), write

            def forward(self, x):
                h = self.a(x).relu()
                b = self.b(h)
                if self.write:
                    h.add_(1)
                return self.d(b + self.c(h))

        batch = (noise(3, 4), None)
        assert names(choose(Branches(False), batch)) == ["a:input", "b:input", "d:input"]
        model = built(lambda: Branches(True))
        taps = choose(model, batch)
        assert names(taps) == ["a:input", "b:input", "c:input", "d:input"]
        _, rows = read(model, taps, batch)
        h = model.a(batch[0]).relu()
        torch.testing.assert_close(rows[1], h)
        torch.testing.assert_close(rows[2], h + 1)

    def test_layers_that_do_not_run_are_left_out(self):
        class Auxiliary(nn.Module):
            def __init__(self):
                super().__init__()
                self.auxiliary, self.fc = nn.Linear(4, 3), nn.Linear(4, 3)

            def forward(self, x):
                return self.fc(x)

        assert names(choose(Auxiliary(), (noise(2, 4), None))) == ["fc:input"]

    def test_a_model_without_features_says_what_to_do(self):
        with pytest.raises(
            ValueError, match=r"`layers` must be given for a model in whose .*layers=\['encoder'\]"
        ):
            choose(nn.Identity(), (noise(2, 4), None))


class TestWidth:
    @pytest.mark.parametrize("max_width", [2048, 2047, 1000, 512, 1])
    def test_the_widest_is_pooled_first_then_dropped(self, max_width):
        taps = choose(cifar10_cnn(), (noise(2, 3, 32, 32), None), max_width)
        assert sum(tap.width for tap in taps) <= max(max_width, 512)
        assert names(taps)[-1] == "fc2:input"

    def test_pooling_comes_before_dropping(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 3)

            def forward(self, x):
                return self.c(self.b(self.a(x)).mean((2, 3)))

        batch = (noise(2, 1, 9, 9), None)
        widths = [[tap.width for tap in choose(Two(), batch, width)] for width in (132, 131, 35, 11)]
        assert widths == [[128, 4], [32, 4], [8, 4], [4]]

    def test_stride_respects_max_width_and_says_what_it_reads(self):
        model, train, _ = trained(BatchNormCNN, n_train=12, steps=1)
        method = STRIDE(model, train, features=Features(max_width=70)).fit()
        assert method.layers_ == ["conv2:input", "fc:input"]
        assert method._states[0].operators.features.shape[1] == 4 * 4 + 48


class TestNamedTaps:
    def test_outputs_and_inputs_by_name(self, planted):
        model, _, test = planted
        with torch.no_grad():
            taps = named_taps(model, ["relu1", "fc2:input", "fc2"], test.tensors)
        assert names(taps) == ["relu1", "fc2:input", "fc2"]
        _, rows = read(model, taps, test.tensors)
        torch.testing.assert_close(rows[0], model.fc1(test.tensors[0]).relu())
        assert torch.equal(rows[1], rows[0])
        torch.testing.assert_close(rows[2], model.fc2(rows[0]))

    def test_stride_reads_the_named_layers_in_their_order(self, planted):
        method = STRIDE(*planted[:2], layers=["relu2", "relu1"]).fit()
        assert method.layers_ == ["relu2", "relu1"]
        same = STRIDE(*planted[:2], layers=("fc3:input", "fc2:input")).influence(planted[2].tensors)
        assert torch.equal(method.influence(planted[2].tensors), same)

    @pytest.mark.parametrize(
        ("wrong", "nearest"),
        [("fc9", "'fc3', 'fc2', 'fc1'"), ("relu", "'relu2', 'relu1'"), ("fc33:input", "'fc3'")],
    )
    def test_wrong_names_give_the_nearest(self, planted, wrong, nearest):
        with pytest.raises(
            ValueError, match=rf"`layers` must name submodules of `model`; got '{wrong}'. Nearest: {nearest}"
        ):
            STRIDE(*planted[:2], layers=[wrong]).fit()

    def test_other_mistakes(self, planted):
        with pytest.raises(
            TypeError, match=r"`layers` must be a list of submodule names; got str. Write layers=\['fc1'\]"
        ):
            STRIDE(*planted[:2], layers="fc1").fit()
        with pytest.raises(ValueError, match="`layers` must name at least one submodule; got an empty list"):
            STRIDE(*planted[:2], layers=[]).fit()
        with pytest.raises(ValueError, match="`layers` must name submodules of `model`; got ''"):
            STRIDE(*planted[:2], layers=[""]).fit()

    def test_a_layer_that_does_not_run(self):
        model = nn.ModuleDict({"unused": nn.Linear(2, 2)})
        model.forward = lambda x: x
        with pytest.raises(
            ValueError, match="`layers` must name submodules that run in the forward pass; got 'unused'"
        ):
            named_taps(model, ["unused"], (noise(2, 2), None))

    def test_a_layer_that_gives_no_tensor(self):
        class Odd(nn.Module):
            def forward(self, x):
                return "words"

        model = nn.Module()
        model.odd, model.forward = Odd(), lambda x: (model.odd(x), x)[1]
        with pytest.raises(TypeError, match=r"`layers` must give a tensor \('odd'\); got str"):
            named_taps(model, ["odd"], (noise(2, 2), None))

    def test_a_batch_without_a_batch_dimension(self):
        model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), noise(6, 4)
        with torch.no_grad():
            taps = named_taps(model, ["0"], (x, None))
        model.forward = lambda x: model[1](model[0](x)).mean(0, keepdim=True)
        with pytest.raises(
            ValueError,
            match=r"`layers` must give one row per example \(1 in this batch\); got 6 rows from '0'. Is a",
        ):
            read(model, taps, (x, None))

    def test_outputs_that_are_tuples_or_objects_are_unwrapped(self):
        model = nn.ModuleDict({"lstm": nn.LSTM(4, 3, batch_first=True)})
        model.forward = lambda x: model["lstm"](x)[0][:, -1]
        x = noise(2, 5, 4)
        taps = named_taps(model, ["lstm"], (x, None))
        _, rows = read(model, taps, (x, None))
        torch.testing.assert_close(rows[0], model["lstm"](x)[0].mean(1))


class TestRecording:
    def test_in_place_activations_do_not_reach_what_was_read_before_them(self):
        model, train, _ = trained(BatchNormCNN, n_train=5, steps=1)
        x = train.tensors[0]
        with torch.no_grad():
            taps = named_taps(model, ["bn1", "relu1"], train.tensors)
        outputs, rows = read(model, taps, train.tensors)
        before = model.bn1(model.conv1(x))
        torch.testing.assert_close(rows[0], to_rows(before, 2, 4))
        torch.testing.assert_close(rows[1], to_rows(before.relu(), 2, 4))
        torch.testing.assert_close(outputs, model(x))

    def test_a_model_that_writes_over_its_activations(self):
        class Overwriting(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, N_CLASSES)

            def forward(self, x):
                h = self.a(x)
                h.relu_()
                out = self.b(h)
                h.zero_()
                return self.c(out.sigmoid_())

        model, x = built(Overwriting), noise(6, 4)
        given = x.clone()
        with torch.no_grad():
            taps = named_taps(model, ["a", "b:input", "b"], (x, None))
        with recording(model, taps) as run, torch.no_grad():
            for rows in (run((x, None))[1], run((x, None))[1]):
                a = model.a(x)
                torch.testing.assert_close(rows[0], a)
                torch.testing.assert_close(rows[1], a.relu())
                torch.testing.assert_close(rows[2], model.b(a.relu()))
        assert torch.equal(x, given)

    def test_a_model_that_writes_over_its_inputs_and_its_residuals_runs_once(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.r, self.b = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, N_CLASSES)
                self.passes = 0

            def forward(self, x):
                self.passes += 1
                x.sub_(0.5).div_(2)
                h = self.a(x).relu_()
                h += self.r(h).relu_()
                return self.b(h)

        model, x = built(InPlace), noise(6, 4)
        taps = choose(model, (x, None))
        assert torch.equal(x, noise(6, 4))  # a probe gets copies
        assert names(taps) == ["a:input", "r:input", "b:input"]
        model.passes = 0
        outputs, rows = read(model, taps, (x.clone(), None))
        assert model.passes == 1
        inside = (x - 0.5) / 2
        h = model.a(inside).relu()
        sums = h + model.r(h).relu()
        for row, wanted in zip(rows, [inside, h, sums], strict=True):
            torch.testing.assert_close(row, wanted)
        torch.testing.assert_close(outputs, model.b(sums))

    def test_maps_are_not_kept_whole(self):
        held = []

        class Watches(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.relu, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, N_CLASSES)

            def forward(self, x):
                maps = self.relu(self.conv(x))
                kept, means = weakref.ref(maps), maps.mean((2, 3))
                del maps
                held.append(kept() is not None)
                return self.head(means)

        model, x = built(Watches), noise(5, 1, 12, 12)
        with torch.no_grad():
            taps = named_taps(model, ["relu"], (x, None))
        held.clear()
        read(model, taps, (x, None))
        assert held == [False]

    def test_hooks_are_gone_after_an_exception(self, planted):
        model = planted[0]
        taps = [Tap("fc1", False, 0, 1, 8), Tap("nothing", False, 0, 1, 8)]
        with pytest.raises(KeyError), recording(model, taps):
            pass
        with pytest.raises(RuntimeError), recording(model, taps[:1]) as run:
            run((torch.zeros(2, 99), None))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_padding_does_not_count_among_the_tokens(self):
        model = built(HuggingFaceLike)
        given = ListOfDicts(6, seed=3)[:]
        given["attention_mask"][0] = 0
        taps = choose(model, given)
        _, rows = read(model, taps, given)
        embedded, mask = model.embedding(given["input_ids"]), given["attention_mask"].bool()
        for i in range(1, 6):
            torch.testing.assert_close(rows[0][i], embedded[i, mask[i]].mean(0))
        assert torch.equal(rows[0][0], torch.zeros(6))
        longer = {**given, "input_ids": F.pad(given["input_ids"], (0, 3), value=7)}
        longer["attention_mask"] = F.pad(given["attention_mask"], (0, 3))
        torch.testing.assert_close(read(model, taps, longer)[1][0], rows[0])

    def test_what_is_read_carries_no_graph(self, planted):
        with recording(planted[0], [Tap("fc1", False, 0, 1, 8)]) as run:
            _, rows = run(planted[2].tensors)
        assert not rows[0].requires_grad
