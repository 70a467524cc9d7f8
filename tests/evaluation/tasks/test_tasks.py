from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from stride_captum.evaluation import train_attributed
from stride_captum.evaluation.tasks import image_data
from stride_captum.evaluation.tasks import networks as models
from stride_captum.evaluation.tasks.example_reading import Reader
from stride_captum.evaluation.tasks.factories import import_factory
from stride_captum.evaluation.tasks.image_data import image_tensors, normalise_images
from stride_captum.evaluation.tasks.loading import load_task
from stride_captum.evaluation.tasks.task import Task


class TestDigits:
    def test_is_all_of_scikit_learns_digits_once(self):
        from sklearn.datasets import load_digits

        task = load_task("digits")
        assert (task.name, task.n_train, len(task.test), task.n_classes) == ("digits-1397", 1397, 400, 10)
        x, y = (torch.cat([a, b]) for a, b in zip(task.train.tensors, task.test.tensors, strict=True))
        assert x.shape == (1797, 1, 8, 8)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (x.min(), x.max()) == (0, 1)
        bunch = load_digits()
        mine = sorted(
            (*row, label) for row, label in zip((x.view(1797, 64) * 16).tolist(), y.tolist(), strict=True)
        )
        theirs = sorted(
            (*row, label) for row, label in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)
        )
        assert mine == theirs

    def test_is_the_same_every_time_and_leaves_random_state_alone(self):
        before = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        one, two = load_task(), load_task("digits", preset="paper")
        assert torch.equal(one.train.tensors[0], two.train.tensors[0])
        assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    def test_smoke_is_the_beginning_of_the_training_set(self):
        smoke, full = load_task(preset="smoke"), load_task()
        assert smoke.name == "digits-300"
        assert torch.equal(smoke.train.tensors[0], full.train.tensors[0][:300])
        assert torch.equal(smoke.test.tensors[0], full.test.tensors[0])


@pytest.mark.parametrize(
    ("build", "shape", "layer", "width"),
    [
        (models.digits_mlp, (1, 8, 8), "relu2", 64),
        (models.mnist_mlp, (1, 28, 28), "relu2", 256),
        (models.cifar10_cnn, (3, 32, 32), "relu3", 512),
    ],
)
def test_networks_of_table_2_have_ten_logits_and_the_papers_features(build, shape, layer, width):
    model = build().eval()
    seen = []
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
    assert seen == [(2, width)]


class TestNames:
    def test_unknown_names_are_refused_with_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"`task` must be one of 'digits', .* got 'minst'. Nearest: 'mnist'"
        ):
            load_task("minst")
        with pytest.raises(
            ValueError, match=r"`preset` must be one of 'smoke', 'small', 'paper'; got 'papr'. Nearest"
        ):
            load_task(preset="papr")

    def test_factories_that_cannot_be_imported_are_refused(self):
        with pytest.raises(ValueError, match="`data` must be written as module:factory; got 'mymodule'"):
            load_task(data="mymodule")
        with pytest.raises(
            ValueError, match=r"`model` must name a module that can be imported; .*PYTHONPATH"
        ):
            load_task(model="no_such_module_here:build")
        with pytest.raises(
            ValueError, match=r"`data` must name a callable of 'json'; got 'lods'. It has .*'loads'"
        ):
            import_factory("data", "json:lods")


class TestOwn:
    def test_some_settings_of_the_training_can_be_replaced(self):
        usual = load_task("digits").training
        found = load_task("digits", training={"epochs": 3}).training
        assert (found.epochs, found.learning_rate) == (3, usual.learning_rate)
        with pytest.raises(ValueError, match=r"`training` must be one of .*got 'epoch'. Nearest: 'epochs'"):
            load_task("digits", training={"epoch": 3})

    def test_a_network_that_cannot_read_the_inputs_is_refused_before_anything_is_trained(self):
        own = "stride_captum.evaluation.tasks.networks:synthetic_mlp"
        with pytest.raises(
            ValueError, match=r"`model` must read inputs of shape \(2, 1, 8, 8\) in float32; got .*synthetic"
        ):
            load_task("digits", model=own)

    def test_a_key_of_the_label_is_for_own_data(self):
        with pytest.raises(
            ValueError, match="`label_key` must be left out without data of your own; got 'y'"
        ):
            load_task("digits", label_key="y")


class TestTask:
    def task(self, *tensors, **changes):
        data = TensorDataset(*tensors)
        return Task("own", data, data, models.synthetic_mlp, models.DIGITS_TRAINING, **changes)

    X, Y = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4

    def test_data_that_are_right_are_not_copied(self):
        data = TensorDataset(self.X, self.Y)
        task = Task("own", data, data, models.synthetic_mlp, models.DIGITS_TRAINING)
        assert task.train is data

    @pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
    def test_a_subclass_that_changes_its_examples_is_read_as_methods_read_it(self, loss):
        class Doubled(TensorDataset):
            def __getitem__(self, i):
                x, y = super().__getitem__(i)
                return 2 * x, y

        labels = self.Y if loss == "cross_entropy" else self.Y[:, None].float()
        data = Doubled(self.X, labels)
        task = Task("own", data, data, models.synthetic_mlp, models.DIGITS_TRAINING, loss=loss)
        for dataset in (task.train, task.test):
            assert torch.equal(dataset.tensors[0], 2 * self.X)
            assert torch.equal(dataset[3][0], data[3][0])
            assert torch.equal(dataset.tensors[1], labels)

    @pytest.mark.parametrize(
        "labels",
        [
            Y.int(),
            Y.to(torch.uint8),
            Y.double(),
            Y[:, None],
            nn.functional.one_hot(Y),
            nn.functional.one_hot(Y).float(),
        ],
        ids=["int32", "uint8", "float64", "column", "one-hot", "one-hot floats"],
    )
    def test_labels_of_other_types_become_class_indices(self, labels):
        x, y = self.task(self.X, labels).train.tensors
        assert x is self.X
        assert y.dtype == torch.int64
        assert torch.equal(y, self.Y)

    def test_a_column_that_numbers_the_examples_is_left_out(self):
        task = self.task(self.X, self.Y, torch.arange(5, 17))
        assert [t.shape for t in task.train.tensors] == [(12, 20), (12,)]
        with pytest.raises(ValueError, match=r"`train` must .* examples of 3 parts: float32 \(20,\), int64"):
            self.task(self.X, self.Y, torch.arange(12) // 3)

    def test_inputs_out_of_a_network_or_of_inference_can_be_trained_on(self):
        (x, _) = self.task(self.X.clone().requires_grad_(), self.Y).train.tensors
        assert not x.requires_grad
        with torch.inference_mode():
            made = self.X * 2
        assert not self.task(made, self.Y).train.tensors[0].is_inference()

    def test_what_is_wrong_is_said_of_the_set_that_it_is_in(self):
        right, wrong = TensorDataset(self.X, self.Y), TensorDataset(self.X, self.Y.float() + 0.5)
        with pytest.raises(
            ValueError, match=r"`test` must hold one class label .*For regression take loss='mse'"
        ):
            Task("own", right, wrong, models.synthetic_mlp, models.DIGITS_TRAINING)

    def test_missing_values_are_found(self):
        x = self.X.clone()
        x[5, 2] = float("nan")
        task = self.task(x, self.Y)
        with pytest.raises(
            ValueError, match=r"`train` must hold finite inputs; .* in example 5 \(1 of 12 like it\)"
        ):
            task.check_inputs()
        with pytest.raises(ValueError, match="`train` must hold finite inputs"):
            train_attributed(task, 0)


class TestMissingData:
    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_without_a_folder_the_flag_is_named(self, name):
        with pytest.raises(
            FileNotFoundError, match=f"task '{name}' reads files .* Name their folder with --data-root"
        ):
            load_task(name)

    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_an_empty_folder_is_named_with_the_remedy(self, name, tmp_path):
        pytest.importorskip("torchvision")
        with pytest.raises(
            FileNotFoundError, match=r"found no data in .* Point --data-root at .* --data module:factory"
        ) as e:
            load_task(name, data_root=tmp_path)
        assert str(tmp_path) in str(e.value)


OWN = '''
import torch
from torch import nn
from torch.utils.data import Dataset


class Own(Dataset):
    """Pairs of an input and a label."""

    def __init__(self, root=None, train=True):
        self.n = 12 if train else 5
        self.train = train

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3,), float(i if self.train else -i - 1)), i % 2


def network():
    return nn.Linear(3, 2)


def needs_root(root, train):
    raise RuntimeError("Dataset not found or corrupted")
'''


class TestOwnData:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "own_module_for_tests.py").write_text(OWN)
        monkeypatch.syspath_prepend(tmp_path)

    def test_data_and_network_come_from_their_factories(self):
        task = load_task(data="own_module_for_tests:Own", model="own_module_for_tests:network")
        assert (task.n_train, len(task.test), task.n_classes) == (12, 5, 2)
        assert torch.equal(task.train.tensors[0][7], torch.full((3,), 7.0))
        assert task.train.tensors[1].tolist() == [0, 1] * 6
        assert isinstance(task.build_model(), nn.Linear)
        assert task.note == "Data from own_module_for_tests:Own."

    def test_settings_replace_table_3(self):
        settings = models.TrainingSettings(optimizer="sgd", learning_rate=0.1, epochs=1)
        assert load_task(training=settings).training == settings

    def test_a_factory_that_needs_a_folder_says_so(self):
        with pytest.raises(
            ValueError, match=r"`data` must name a factory .*'root'.* name it with --data-root DIR"
        ):
            load_task(data="own_module_for_tests:needs_root")
        with pytest.raises(ValueError, match=r"can be called with \(data_root, train=\.\.\.\)"):
            load_task(data="own_module_for_tests:network", data_root="x")

    def test_a_factory_that_finds_nothing_says_where_it_looked(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"needs_root' found no data in .* --data-root DIR"
        ) as error:
            load_task(data="own_module_for_tests:needs_root", data_root=tmp_path)
        assert str(tmp_path) in str(error.value)


class TestTensors:
    def test_images_are_scaled_and_normalised_channel_by_channel(self):
        images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
        before = images.copy()
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
        result = normalise_images(images, mean, std)
        expected = (images / 255 - mean.numpy()) / std.numpy()
        np.testing.assert_allclose(result.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
        np.testing.assert_array_equal(images, before)
        assert result.is_contiguous()

    def test_torchvision_layouts(self):
        white = torch.full((2, 28, 28), 255, dtype=torch.uint8)
        x, y = image_tensors(SimpleNamespace(data=white, targets=torch.tensor([3, 4]))).tensors
        assert x.shape == (2, 1, 28, 28)
        torch.testing.assert_close(x, torch.full_like(x, (1 - image_data.MNIST_MEAN) / image_data.MNIST_STD))
        assert (white == 255).all()
        assert y.tolist() == [3, 4]
        color = SimpleNamespace(data=np.zeros((2, 32, 32, 3), dtype=np.uint8), targets=[1, 0])
        x, y = image_tensors(color).tensors
        torch.testing.assert_close(x[0, :, 0, 0], -image_data.CIFAR10_MEAN / image_data.CIFAR10_STD)
        assert y.dtype == torch.int64

    def test_a_tensor_dataset_is_not_copied(self):
        data = TensorDataset(torch.zeros(2, 1), torch.zeros(2))
        assert all(a is b for a, b in zip(Reader().tensors(data), data.tensors, strict=True))

    def test_datasets_longer_than_a_batch_keep_their_order(self):
        class Long(Dataset):
            def __len__(self):
                return 1500

            def __getitem__(self, i):
                if i >= 1500:
                    raise IndexError
                return torch.tensor([float(i)]), i % 7

        x, y = Reader().tensors(Long())
        assert x[:, 0].tolist() == list(range(1500))
        assert y.tolist() == [i % 7 for i in range(1500)]


@pytest.mark.data
class TestRealData:
    def test_small_mnist_is_the_first_5000_images(self, data_root: Path):
        task = load_task("mnist", data_root=data_root)
        x, y = task.train.tensors
        assert (task.name, x.shape, len(task.test)) == ("mnist-5000", (5000, 1, 28, 28), 10_000)
        raw = data_root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
        content = raw.read_bytes() if raw.exists() else gzip.decompress(raw.with_suffix(".gz").read_bytes())
        assert y.tolist() == list(content[8:5008])

    def test_paper_mnist_is_everything_with_mean_0_and_variance_1(self, data_root: Path):
        x = load_task("mnist", preset="paper", data_root=data_root).train.tensors[0]
        assert len(x) == 60_000
        assert x.mean().item() == pytest.approx(0, abs=1e-3)
        assert x.std().item() == pytest.approx(1, abs=1e-3)

    def test_rebuilt_cifar10_goes_in_through_a_factory_and_is_noted(self, data_root: Path, monkeypatch):
        if not (data_root / "cifar10_rebuilt.py").exists():
            pytest.skip("no cifar10_rebuilt.py in STRIDE_CAPTUM_DATA")
        monkeypatch.syspath_prepend(data_root)
        task = load_task(
            "cifar10", preset="smoke", data_root=data_root, data="cifar10_rebuilt:CIFAR10Rebuilt"
        )
        assert task.train.tensors[0].shape == (500, 3, 32, 32)
        assert task.n_classes == 10
        assert "9,980 of the 10,000" in task.note
        assert abs(task.train.tensors[0].mean()) < 0.1
        assert task.train.tensors[0].std().item() == pytest.approx(1, abs=0.1)
