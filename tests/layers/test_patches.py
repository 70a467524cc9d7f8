"""Patches of convolutions: what their kernels read, at the positions of the outputs."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.data.batch import ExampleBatch
from stride_captum.layers.patches import Patches
from stride_captum.layers.pooling import Tap
from stride_captum.layers.taps import default_taps, named_taps

CONVOLUTIONS = [
    (1, {"kernel_size": 5, "padding": 2}),
    (1, {"kernel_size": 4, "padding": "same"}),
    (1, {"kernel_size": 3, "padding": "valid", "dilation": 2}),
    (1, {"kernel_size": 3, "padding": 3, "padding_mode": "circular", "stride": 2}),
    (2, {"kernel_size": 3, "padding": 1, "stride": 2}),
    (2, {"kernel_size": (3, 2), "padding": (2, 1), "dilation": (1, 3), "stride": (2, 1)}),
    (2, {"kernel_size": (2, 5), "padding": "same", "padding_mode": "reflect"}),
    (2, {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "replicate"}),
    (3, {"kernel_size": (3, 1, 2), "padding": (1, 0, 1), "stride": (1, 2, 1)}),
]


def same(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def convolution(n_dims: int, options: dict) -> nn.Module:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kinds[n_dims - 1](3, 4, bias=False, **options).double()


class TestPatches:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize(("n_dims", "options"), CONVOLUTIONS)
    def test_their_products_with_the_kernels_are_the_outputs(self, n_dims, options):
        layer = convolution(n_dims, options)
        maps = torch.randn(2, 3, *(9, 8, 7)[:n_dims], generator=torch.Generator().manual_seed(1)).double()
        patches = Patches.of_layer(layer)
        found = patches.read(maps)
        outputs = layer(maps).detach()
        same((found @ layer.weight.detach().flatten(1).T).movedim(-1, 1), outputs, 1e-12)
        assert patches.sizes(maps.shape[2:]) == tuple(outputs.shape[2:])

    def test_of_what_reads_single_positions_there_are_none(self):
        others = (
            nn.Linear(3, 3),
            nn.Conv2d(3, 3, 1),
            nn.Conv1d(3, 3, 1, stride=2),
            nn.ConvTranspose2d(3, 3, 3),
        )
        assert [Patches.of_layer(layer) for layer in others] == [None] * 4

    def test_a_file_keeps_them(self):
        tap = Tap("conv", True, 2, 1, 27, per_position=True, patches=Patches.of_layer(nn.Conv2d(3, 3, 3)))
        assert Tap.of_plain(json.loads(json.dumps(asdict(tap)))) == tap
        plain = {key: value for key, value in asdict(tap).items() if key != "patches"}
        assert Tap.of_plain(plain).patches is None  # a file of before they were known

    @pytest.mark.parametrize(
        ("options", "size", "grid", "aligned"),
        [
            ({"padding": 1}, 8, 8, True),
            ({"padding": 1}, 8, 4, True),
            ({"padding": 1, "stride": 2}, 7, 8, True),
            ({"padding": 0}, 8, 6, True),  # as long as the outputs of the model
            ({"padding": 0}, 8, 8, False),
            ({"padding": 2}, 8, 8, False),  # of a causal convolution, whose last entries are cut off
            ({"padding": 0, "stride": 3}, 9, 8, True),
        ],
    )
    def test_whether_they_lie_around_positions(self, options, size, grid, aligned):
        assert Patches.of_layer(nn.Conv1d(1, 1, 3, **options)).are_aligned([size], [grid]) is aligned


class Causal(nn.Module):
    """Tokens to logits by a convolution that sees what comes before, in one of two usual ways."""

    def __init__(self, pads_before: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.pads_before = pads_before
        self.conv = nn.Conv1d(4, 6, 3, padding=0 if pads_before else 2)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        x = self.conv(F.pad(x, (2, 0))) if self.pads_before else self.conv(x)[..., : tokens.shape[1]]
        return self.head(torch.relu(x).transpose(1, 2))


class TwoBranches(nn.Module):
    """Images to maps; a shortcut and a strided convolution read the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 5, 1)
        self.second = nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.head = nn.Conv2d(5, 3, 1)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images))
        return self.head(torch.relu(self.shortcut(x) + F.interpolate(self.second(x), scale_factor=2)))


@pytest.fixture
def images() -> tuple[nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoBranches().eval()
    x = torch.randn(10, 1, 6, 6, generator=generator).double()
    return model, TensorDataset(x, torch.randint(3, (10, 6, 6), generator=generator))


def batch_of(data: TensorDataset) -> ExampleBatch:
    return ExampleBatch.of(tuple(tensor[:4] for tensor in data.tensors))


class TestDefaultLayers:
    @pytest.mark.parametrize(("pads_before", "width"), [(True, 12), (False, 4)])
    def test_of_a_causal_convolution_no_patch_lies_around_another_position(self, pads_before, width):
        tokens = torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(0))
        model = Causal(pads_before).eval()
        taps = default_taps(model, ExampleBatch.of((tokens, tokens % 3)), 4096)
        assert [(str(tap), tap.width) for tap in taps] == [("conv:input", width), ("head:input", 6)]

    def test_a_map_is_read_beside_patches_that_do_not_hold_it(self, images):
        taps = default_taps(images[0], batch_of(images[1]), 4096)
        wanted = [("shortcut:input", 4), ("second:input", 36), ("head:input", 5)]
        assert [(str(tap), tap.width) for tap in taps] == wanted

    def test_a_map_that_stands_in_patches_counts_once_and_other_patches_count_too(self, images):
        model = images[0]
        model.second = nn.Conv2d(4, 5, 3, padding=1).double()
        wide = nn.Conv2d(4, 5, 3, padding=2, dilation=2).double()

        class Wider(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.wide = model, wide

            def forward(self, images: Tensor) -> Tensor:
                x = torch.relu(self.model.first(images))
                read = self.model.shortcut(x) + self.model.second(x) + self.wide(x)
                return self.model.head(torch.relu(read))

        taps = default_taps(Wider().eval(), batch_of(images[1]), 4096)
        wanted = [("model.second:input", 36), ("wide:input", 36), ("model.head:input", 5)]
        assert [(str(tap), tap.width) for tap in taps] == wanted
        assert [tap.patches.hold_the_map for tap in taps[:2]] == [True, True]

    def test_positions_in_one_row_are_not_thinned_out(self):
        class Rows(nn.Module):
            """Grids to logits by convolutions over all positions in one row."""

            def __init__(self, size: int) -> None:
                super().__init__()
                self.first = nn.Conv1d(2, 3, 1)
                self.second = nn.Conv1d(3, 4, 3, padding=1, stride=size * size // 16)
                self.head = nn.Conv2d(4, 3, 1)
                self.double()

            def forward(self, x: Tensor) -> Tensor:
                found = torch.relu(self.second(torch.relu(self.first(x.flatten(2)))))
                found = F.interpolate(found, size=16) if found.shape[2] != 16 else found
                return self.head(found.unflatten(2, (4, 4)))

        y = torch.zeros(4, 4, 4, dtype=torch.long)
        for size, most, wanted in (
            (4, 4096, [("second:input", 9), ("head:input", 4)]),
            (8, 4096, [("second:input", 9), ("head:input", 4)]),
            (8, 12, [("head:input", 4)]),  # the map has 64 positions
        ):
            taps = default_taps(
                Rows(size).eval(), ExampleBatch.of((torch.randn(4, 2, size, size).double(), y)), most
            )
            assert [(str(tap), tap.width) for tap in taps] == wanted

        class Thinned(Rows):
            def __init__(self) -> None:
                super().__init__(4)
                self.second = nn.Conv1d(3, 4, 3, padding=1, stride=2).double()

        batch = ExampleBatch.of((torch.randn(4, 2, 4, 4).double(), y))
        taps = default_taps(Thinned().eval(), batch, 4096)
        assert [(str(tap), tap.width) for tap in taps] == [("second:input", 3), ("head:input", 4)]

    def test_tokens_of_several_widths_from_one_layer_stand_side_by_side(self):
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.head = nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(5, 3)
                self.relu = nn.ReLU()

            def forward(self, tokens: Tensor) -> Tensor:
                return self.head(self.relu(self.second(self.relu(self.first(tokens)))))

        batch = ExampleBatch.of((torch.randn(4, 6, 2), torch.zeros(4, 6, dtype=torch.long)))
        assert [tap.width for tap in named_taps(Shared().eval(), ["relu"], batch)] == [9]

    def test_maps_of_several_sizes_from_one_layer_are_refused(self, images):
        class Twice(TwoBranches):
            def forward(self, images: Tensor) -> Tensor:
                x = torch.relu(self.first(images))
                shared = self.shortcut(x) + F.interpolate(self.shortcut(F.avg_pool2d(x, 2)), scale_factor=2)
                return self.head(torch.relu(shared))

        with pytest.raises(ValueError, match="maps of one size"):
            named_taps(Twice().eval(), ["shortcut:input"], batch_of(images[1]))

    @pytest.mark.parametrize(("most", "widths"), [(45, [4, 36, 5]), (44, [4, 4, 5]), (12, [4, 5]), (8, [5])])
    def test_patches_are_given_up_before_layers_are(self, images, most, widths):
        assert [tap.width for tap in default_taps(images[0], batch_of(images[1]), most)] == widths

    def test_outputs_of_layers_and_one_row_an_example_have_none(self, images):
        taps = named_taps(images[0], ["first", "second:input", "first:input"], batch_of(images[1]))
        assert [tap.width for tap in taps] == [4, 36, 9]

        class Pooled(TwoBranches):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images).mean((2, 3))

        one_label = ExampleBatch.of((images[1].tensors[0], torch.zeros(10, dtype=torch.long)))
        taps = default_taps(Pooled().eval(), one_label, 4096)
        assert [tap.patches for tap in taps] == [None] * len(taps)


class AsMaps(nn.Module):
    """`TwoBranches` with the patches of its second convolution as a map of their own."""

    def __init__(self, model: TwoBranches) -> None:
        super().__init__()
        self.model, self.patches = model, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.model.first(images))
        self.patches(F.unfold(x, 3, padding=1, stride=2).unflatten(-1, (3, 3)))
        return self.model(images)


@pytest.mark.parametrize("form", ["rows", "matrix"])
def test_scores_are_those_of_the_patches_as_a_map(images, form, tmp_path):
    model, train = images
    tests = tuple(tensor[:3] for tensor in train.tensors)
    layers = ["model.shortcut:input", "patches", "model.head:input"]
    options = {"operators": ClosedForm(form=form, damping=0.5), "batch_size": 4}
    wanted = STRIDE(AsMaps(model).eval(), train, layers=layers, **options)
    method = STRIDE(model, train, **options)
    same(method.influence(tests), wanted.influence(tests), 1e-10)
    method.save(tmp_path / "method")
    loaded = STRIDE.load(tmp_path / "method", model, train)
    same(loaded.influence(tests), wanted.influence(tests), 1e-10)
    for _ in range(2):  # what is stored is float32; the second method reads it
        stored = STRIDE(model, train, feature_store=tmp_path / "store", **options)
        same(stored.influence(tests), wanted.influence(tests), 1e-6)
