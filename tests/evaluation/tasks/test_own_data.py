"""Data of the user's: each kind that people have is right, or refused in one sentence with what came."""

from __future__ import annotations

import json
import random
import sys
import types
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from typer.testing import CliRunner

from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.retraining.training import mean_residual, train_model
from stride_captum.evaluation.tasks.checks import check_task
from stride_captum.evaluation.tasks.class_order import first_examples, in_class_order, in_order
from stride_captum.evaluation.tasks.factories import import_factory
from stride_captum.evaluation.tasks.loading import load_task
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.losses import MSE, BinaryCrossEntropy, CrossEntropy
from stride_captum.losses.summed_positions import SummedPositions

N, N_TEST, N_CLASSES = 24, 9, 3
Pair = namedtuple("Pair", "image target")


def xy(train):
    n = N if train else N_TEST
    generator = torch.Generator().manual_seed(int(train))
    return torch.randn(n, 6, generator=generator), torch.arange(n) % N_CLASSES


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, N_CLASSES))


def one_logit():
    return nn.Linear(6, 1)


class Items(Dataset):
    def __init__(self, n, item):
        self.n, self.item = n, item

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.item(i)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def items_of(make):
    """A factory whose examples are `make(x, y, i)`."""

    def factory(train):
        x, y = xy(train)
        return Items(len(x), lambda i: make(x[i], y[i], i))

    return factory


def tensors_of(make):
    """A factory of a `TensorDataset` of `make(x, y)`."""
    return lambda train: TensorDataset(*make(*xy(train)))


@pytest.fixture
def load(monkeypatch):
    """Loads the task of a factory as the command line does."""
    module = types.ModuleType("module_of_a_test")
    module.network, module.one_logit = network, one_logit
    monkeypatch.setitem(sys.modules, "module_of_a_test", module)

    def load(factory, model=network, **options):
        module.factory, module.model = factory, model
        return load_task(data="module_of_a_test:factory", model="module_of_a_test:model", **options)

    return load


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


RIGHT = {
    "int32": tensors_of(lambda x, y: (x, y.int())),
    "whole floats": tensors_of(lambda x, y: (x, y.double())),
    "one-hot": tensors_of(lambda x, y: (x, nn.functional.one_hot(y).float())),
    "float64 inputs": tensors_of(lambda x, y: (x.double(), y)),
    "arrays": items_of(lambda x, y, i: (x.numpy().astype("float64"), np.int32(y))),
    "named tuple": items_of(lambda x, y, i: Pair(x, int(y))),
    "list": lambda train: [[x, y] for x, y in zip(*xy(train), strict=True)],
    "labels": items_of(lambda x, y, i: {"pixels": x, "labels": y}),
    "label": items_of(lambda x, y, i: {"label": y, "pixels": x.numpy()}),
    "stream": lambda train: Stream(list(zip(*xy(train), strict=True))),
    "generator": lambda train: zip(*xy(train), strict=True),
    "numbered": items_of(lambda x, y, i: (x, y, i)),
    "subset": lambda train: Subset(TensorDataset(*xy(train)), range(len(xy(train)[0]))),
}


@pytest.mark.parametrize("factory", RIGHT.values(), ids=RIGHT)
def test_what_people_have_is_read(load, factory):
    task = load(factory)
    for data, train in ((task.train, True), (task.test, False)):
        x, y = xy(train)
        assert torch.equal(data.tensors[0], x)
        assert torch.equal(data.tensors[1], y)


def masked(x, y):
    return x, torch.where(torch.arange(len(x)) == 4, -1, y)


WRONG = {
    "weights": (items_of(lambda x, y, i: (x, y, 0.5)), r"3 parts: float32 \(6,\), int64 \(\), float of"),
    "groups": (items_of(lambda x, y, i: (x, y, i // 3)), r"examples of 3 parts: .* int of .*Leave the other"),
    "two inputs": (tensors_of(lambda x, y: (x, x, y)), r"examples of 3 parts: .*Several inputs go into one"),
    "no label": (lambda train: TensorDataset(xy(train)[0]), r"got examples of 1 part: float32 \(6,\) of"),
    "bare tensors": (lambda train: xy(train)[0], r"got examples that are float32 \(6,\)"),
    "arrays": (lambda train: tuple(t.numpy() for t in xy(train)), r"float32 \(24, 6\) of .*TensorDataset"),
    "two labels": (items_of(lambda x, y, i: {"x": x, "label": y, "labels": y}), "one input and one label"),
    "other key": (items_of(lambda x, y, i: {"x": x, "target": y}), "dicts with 'x', 'target' of .*--label"),
    "two inputs in a dict": (items_of(lambda x, y, i: {"a": x, "b": x, "label": y}), "dicts with 'a', 'b'"),
    "nested": (items_of(lambda x, y, i: ((x, x), y)), r"a tuple of 2 parts: float32 \(6,\), .*Join the"),
    "texts": (items_of(lambda x, y, i: ("a text", y)), "inputs that are str 'a text' .*token ids"),
    "names": (items_of(lambda x, y, i: (x, "abc"[y])), "labels that are str 'a' of .*Map the names to"),
    "none": (items_of(lambda x, y, i: (x, None)), "labels that are NoneType"),
    "sizes": (items_of(lambda x, y, i: (x[: 5 + i % 2], y)), r"several shapes, \(5,\) and \(6,\) .*Resize"),
    "boxes": (items_of(lambda x, y, i: (x, torch.zeros(i % 2 + 1))), r"labels of several shapes, \(1,\) and"),
    "other shapes": (lambda train: TensorDataset(torch.ones(9, 5 + train), torch.ones(9)), "for test ex"),
    "nothing": (lambda train: [], "got no examples of 'module_of_a_test:factory'"),
    "one of three": (lambda train: [(xy(train)[0][0], 1, 7)], "one example of 3 parts"),
    "not a data set": (lambda train: 7, "got an int of .*For instance TensorDataset"),
    "loader": (lambda train: DataLoader(TensorDataset(*xy(train))), "a DataLoader of .*set that it loads"),
    "dict of sets": (lambda train: {"train": 1}, "a dict, which raised KeyError: 0 for example 0"),
    "broken": (items_of(lambda x, y, i: (x, [y][i])), "Items, which raised IndexError: .* for example 1 of"),
    "bfloat16": (tensors_of(lambda x, y: (x.bfloat16(), y)), r"inputs in bfloat16 .*x\.float\(\)"),
    "sparse": (lambda train: [(xy(train)[0][0].to_sparse(), 1)], r"float32 \(6,\), sparse_coo .*to_dense"),
    "missing": (tensors_of(lambda x, y: (x / (x > -2), y)), "finite inputs; got NaN or infinity in example"),
    "regression": (tensors_of(lambda x, y: (x, x[:, 0])), "float32 .*such as .*regression take loss='mse'"),
    "numbers": (tensors_of(lambda x, y: (x, 40.0 * y)), "targets from 0 to 80 for a network of 3 classes"),
    "negative": (tensors_of(lambda x, y: (x, y - 1.0)), "float32 targets from -1 to 1 of .*have no label"),
    "missing label": (tensors_of(lambda x, y: (x, y / (y < 2))), "got inf .* of 24 like it.*have no label"),
    "masked": (tensors_of(masked), r"got -1 \(example 4; 1 of 24 like it\) of .*have no label"),
    "from 1": (tensors_of(lambda x, y: (x, y + 1)), r"labels below 3, .*got 3 \(example 2; 8 of 24 like"),
    "soft": (tensors_of(lambda x, y: (x, x.softmax(1))), r"rows of shape \(24, 6\) of .*Ask the methods"),
    "several": (tensors_of(lambda x, y: (x, (x > 0).int())), "not one 1 each. .*loss='binary_cross_entropy'"),
    "two targets": (tensors_of(lambda x, y: (x, x[:, :2])), "float32 rows .*loss='mse'"),
    "pixels": (tensors_of(lambda x, y: (x, y[:, None, None].expand(-1, 4, 4))), r"shape \(24, 4, 4\) of"),
    "complex": (tensors_of(lambda x, y: (x, y + 0j)), "complex64 labels of"),
}  # fmt: skip


@pytest.mark.parametrize(("factory", "sentence"), WRONG.values(), ids=WRONG)
def test_the_rest_is_refused_with_what_came(load, factory, sentence):
    with pytest.raises(ValueError, match=rf"(?s)`data` must .*{sentence}") as error:
        load(factory)
    assert "module_of_a_test:factory" in str(error.value)


def test_images_that_are_no_tensors_name_the_transform(load):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=r"inputs that are Image of .*ToTensor"):
        load(items_of(lambda x, y, i: (image.new("L", (8, 8)), y)))


def test_a_frame_is_refused(load):
    class Frame(dict):
        def __getitem__(self, name):
            raise KeyError(name)

    with pytest.raises(ValueError, match="a Frame, which raised KeyError: 0 for example 0"):
        load(lambda train: Frame(a=1))


class TestLabelKey:
    def test_another_key_can_be_named(self, load):
        task = load(items_of(lambda x, y, i: {"x": x, "target": y}), label_key="target")
        assert torch.equal(task.train.tensors[1], xy(True)[1])

    def test_it_is_for_dicts(self, load):
        with pytest.raises(
            ValueError, match=r"examples of 2 parts: .*`label_key` is for examples that are dicts"
        ):
            load(RIGHT["named tuple"], label_key="target")
        with pytest.raises(ValueError, match="whose key is 'target'; got dicts with 'pixels', 'labels'"):
            load(RIGHT["labels"], label_key="target")


class TestNotes:
    def test_one_hot_labels(self, load):
        assert "One-hot labels were read as classes." in load(RIGHT["one-hot"]).note

    def test_augmentation_is_named_and_is_the_same_in_every_run(self, load):
        noisy = items_of(lambda x, y, i: (x + torch.randn(6) + np.random.rand() + random.random(), y))
        before = random_states()
        one, two = load(noisy), load(noisy)
        assert random_states() == before
        assert "Inputs change whenever they are read" in one.note
        assert torch.equal(one.train.tensors[0], two.train.tensors[0])
        assert "Inputs change" not in load(RIGHT["arrays"]).note
        assert "Inputs change" not in load(RIGHT["numbered"]).note

    def test_test_examples_among_the_training_examples_are_counted(self, load):
        assert "All 24 test examples are training examples too. Does the factory heed" in (
            load(lambda train: TensorDataset(*xy(True))).note
        )
        some = load(lambda train: TensorDataset(*(t if train else t[:5] for t in xy(True)))).note
        assert "All 5 test examples" in some

        def two_of_nine(train):
            x, y = xy(train)
            if not train:
                x[3:5], y[3:5] = xy(True)[0][:2], xy(True)[1][:2]
            return TensorDataset(x, y)

        assert "2 of the 9 test examples are training examples too." in load(two_of_nine).note

    def test_classes_without_a_training_example(self, load):
        def factory(train):
            x, y = xy(train)
            return TensorDataset(x, y.clamp(max=1) if train else y)

        assert "No training example has class 2 of the test examples." in load(factory).note


class TestClassOrder:
    @pytest.fixture
    def folder(self):
        """As a folder of images: 200 examples of each of 4 classes, one class after the other."""

        def folder(train):
            y = torch.arange(4).repeat_interleave(200 if train else 100)
            return TensorDataset(torch.arange(len(y)).float()[:, None].expand(-1, 6), y)

        return folder

    def wide(self):
        return nn.Linear(6, 4)

    def test_a_preset_and_the_first_test_points_have_all_classes(self, load, folder):
        task = load(folder, self.wide, preset="smoke")
        places, y = task.train.tensors[0][:, 0], task.train.tensors[1]
        assert len(y) == 300
        assert places.tolist() == sorted(set(places.tolist()))
        assert torch.equal(y, places.long() // 200)
        for labels in (y, task.test.tensors[1][:60], task.test.tensors[1][60:120]):
            assert labels.unique().tolist() == [0, 1, 2, 3]
        assert sorted(task.test.tensors[0][:, 0].tolist()) == list(range(400))
        assert "300 training examples are a random draw from 800" in task.note
        assert "were shuffled" in task.note

    def test_numbers_of_test_points_can_be_those_of_the_data_set(self, load, folder):
        task = load(folder, self.wide, mix_test=False)
        assert task.test.tensors[0][:, 0].tolist() == list(range(400))
        assert "shuffled" not in task.note
        assert task.n_train == 800

    def test_data_in_another_order_stay_as_they_are(self, load):
        def factory(train):
            y = torch.arange(400) % 4
            return TensorDataset(torch.arange(400.0)[:, None].expand(-1, 6) + 1000 * train, y)

        task = load(factory, self.wide, preset="smoke")
        assert (task.train.tensors[0][:, 0] - 1000).tolist() == list(range(300))
        assert task.test.tensors[0][:, 0].tolist() == list(range(400))
        assert task.note == "Data from module_of_a_test:factory."

    def test_what_an_order_is(self):
        generator = torch.Generator().manual_seed(0)
        assert in_class_order(torch.tensor([0] * 10 + [1] * 10))
        assert in_class_order(torch.tensor([1] * 90 + [0] * 10))
        assert in_class_order(torch.arange(400) // 10 % 4)
        assert not any(in_class_order(torch.randint(3, (20,), generator=generator)) for _ in range(200))
        assert not in_class_order(torch.zeros(50, dtype=torch.int64))
        assert not in_class_order(torch.zeros(0, dtype=torch.int64))
        assert first_examples(torch.arange(4), None) == (slice(None), [])


class TestNetworks:
    def test_one_logit_is_two_classes(self, load):
        task = load(tensors_of(lambda x, y: (x, y > 0)), one_logit)
        assert task.train.tensors[1].tolist() == (xy(True)[1] > 0).long().tolist()
        with pytest.raises(ValueError, match="`data` must hold labels below 2"):
            load(RIGHT["int32"], one_logit)

    @pytest.mark.parametrize(
        "model",
        [
            lambda: nn.Sequential(network(), nn.Softmax(1)),
            lambda: nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()),
            lambda: nn.Sequential(nn.Linear(6, 1), nn.Sigmoid(), nn.Flatten(0)),
        ],
        ids=["softmax", "sigmoid", "squeezed sigmoid"],
    )
    def test_probabilities_are_refused(self, load, model):
        with pytest.raises(
            ValueError, match=r"`model` must return logits; got probabilities. Leave out the Soft"
        ):
            load(tensors_of(lambda x, y: (x, y > 0)), model)

    def test_a_network_that_cannot_read_the_inputs(self, load):
        with pytest.raises(ValueError, match=r"`model` must read inputs of shape \(2, 6\) in uint8.*/ 255"):
            load(tensors_of(lambda x, y: (x.byte(), y)))
        with pytest.raises(
            ValueError, match=r"shape \(2, 6\) in float32; got 'module_of_a_test:model' \(Attr"
        ):
            load(RIGHT["int32"], lambda: nn.LSTM(6, 3).requires_grad_() and Fails())
        with pytest.raises(ValueError, match=r"got the network of the task .*Name your network with --model"):
            load_task(data="module_of_a_test:factory")

    def test_a_network_in_double_precision_reads_double_inputs(self, load):
        task = load(RIGHT["float64 inputs"], lambda: network().double())
        assert task.train.tensors[0].dtype == torch.float64

    def test_a_network_that_returns_no_tensor(self, load):
        with pytest.raises(TypeError, match=r"`model` must return logits, .*got tuple. Wrap it"):
            load(RIGHT["int32"], lambda: nn.LSTM(6, 3))


class Tags(nn.Module):
    """Three logits for each of six numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x):
        return self.linear(x[:, :, None])


def two_outputs():
    return nn.Linear(6, 2)


class TestLosses:
    def test_regression(self, load):
        factory = tensors_of(lambda x, y: (x.double(), x[:, :2].double()))
        task = load(factory, two_outputs, loss="mse")
        assert task.loss == MSE()
        assert not task.has_classes
        assert torch.equal(task.train.tensors[1], xy(True)[0][:, :2])  # in the dtype of the outputs
        assert task.test.tensors[1].dtype == torch.float32

    @pytest.mark.parametrize("loss", ["binary_cross_entropy", BinaryCrossEntropy()])
    def test_several_labels(self, load, loss):
        task = load(tensors_of(lambda x, y: (x, (x[:, :2] > 0).int())), two_outputs, loss=loss)
        assert task.loss == BinaryCrossEntropy()
        check_task(task)

    def test_outputs_of_three_axes_are_positions(self, load):
        task = load(tensors_of(lambda x, y: (x, torch.where(x > 1, -100, (x > 0).long()))), Tags)
        assert task.loss == SummedPositions(position=CrossEntropy(), n_positions=6, n_outputs=3, shape=(6, 3))
        check_task(task)

    def test_one_output_a_position_is_a_logit_of_two_classes(self, load):
        class Binary(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(1, 1)

            def forward(self, x):
                return self.head(x[..., None])

        task = load(tensors_of(lambda x, y: (x, (x > 0).long())), Binary)
        assert (task.loss.n_positions, task.loss.n_outputs) == (6, 2)
        check_task(task)
        longer = TrainingSettings(optimizer="adam", learning_rate=0.2, epochs=20)
        model = train_model(task.build_model, *task.train.tensors, longer, 0, loss=task.loss)
        assert mean_residual(model, *task.train.tensors, task.loss) < 0.4

    def test_options_of_a_loss(self, load):
        loss = CrossEntropy(label_smoothing=0.1)
        assert load(tensors_of(lambda x, y: (x, y)), loss=loss).loss == loss

    @pytest.mark.parametrize(
        ("labels", "loss", "sentence"),
        [
            (lambda x, y: x[:, :3], "mse", r"`data` must .*shape"),
            (lambda x, y: x[:, :2], "binary_cross_entropy", "`data` must "),
            (lambda x, y: x[:, :2] / (x[:, :2] > -2), "mse", "hold finite labels; got NaN or infinity in"),
            (lambda x, y: y, "hinge", "`loss` must be one of"),
        ],
    )
    def test_labels_that_a_loss_does_not_take(self, load, labels, loss, sentence):
        with pytest.raises(ValueError, match=sentence):
            load(tensors_of(lambda x, y: (x, labels(x, y))), two_outputs, loss=loss)

    def test_built_in_tasks_have_their_own(self):
        with pytest.raises(ValueError, match="`loss` must be left out without data of your own"):
            load_task("digits", loss="mse")

    def test_data_sorted_by_their_targets_are_mixed(self, load):
        def factory(train):
            y = torch.arange(400.0)[:, None].expand(-1, 2)
            return TensorDataset(torch.randn(400, 6), y + 1000 * train)

        task = load(factory, two_outputs, loss="mse", preset="smoke")
        assert task.train.tensors[1][:, 0].max() > 1390
        assert not in_order(task.test.tensors[1])
        assert "sorted by label" in task.note

    @pytest.mark.slow
    def test_a_comparison_of_regressions_from_the_command_line(self, load, tmp_path):
        load(tensors_of(lambda x, y: (x, x[:, :2])), two_outputs, loss="mse")
        sizes = ["--subsets", "4", "--seeds", "1", "--models", "1", "--test-points", "8", "--measure", "lds"]
        own = ["--data", "module_of_a_test:factory", "--model", "module_of_a_test:model", "--loss", "mse"]
        rows = ["--method", "STRIDE", "--method", "Random", "--store", str(tmp_path), "--out", str(tmp_path)]
        command = ["compare", *own, *sizes, *rows, "--jobs", "1", "--training", '{"epochs": 2}', "--quiet"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        results = json.loads((tmp_path / "results.json").read_text())
        assert "output (mse)" in json.dumps(results)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.no_such_method()


class TestFactories:
    def test_what_a_factory_raises_is_named_with_its_line(self, load):
        def factory(train):
            return {}["x"]

        with pytest.raises(ValueError, match=r"which raised KeyError: 'x' \(test_own_data.py, line \d+\)"):
            load(factory)

    def test_one_that_takes_no_train_says_how_to_write_it(self, load):
        with pytest.raises(
            ValueError, match=r"\(train=...\); .* Write it as def factory\(train\): it is called"
        ):
            load(lambda: TensorDataset(*xy(True)))
        with pytest.raises(ValueError, match=r"Write it as def factory\(data_root, train\), or leave out"):
            load(RIGHT["int32"], data_root="x")

    def test_a_module_of_the_folder_must_not_have_the_name_of_a_package(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "colorsys.py").write_text("def make(train): ...")
        with pytest.raises(
            ValueError, match=r"'colorsys', which is colorsys.py here and also .*another name"
        ):
            import_factory("data", "colorsys:make")
        (tmp_path / "time.py").write_text("def make(train): ...")
        with pytest.raises(ValueError, match=r"'time', which is time.py here and also a module of Python"):
            import_factory("data", "time:make")

    def test_a_module_on_the_path_of_the_users_may_have_a_copy_here(self, tmp_path, monkeypatch):
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "copied_module_of_a_test.py").write_text(f"def make(): return {name!r}")
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.syspath_prepend(tmp_path / "there")
        assert import_factory("data", "copied_module_of_a_test:make")() == "there"

    def test_a_module_that_cannot_be_read_is_a_sentence(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "broken_module_of_a_test.py").write_text("def make(")
        with pytest.raises(ValueError, match=r"'broken_module_of_a_test' \(SyntaxError: "):
            import_factory("data", "broken_module_of_a_test:make")

    def test_names_of_the_module_come_before_those_that_it_imports(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "names_of_a_test.py").write_text("from json import loads\ndef mine(): ...")
        (tmp_path / "no_names_of_a_test.py").write_text("")
        with pytest.raises(ValueError, match=r"got 'other'. It has 'mine'\.$"):
            import_factory("data", "names_of_a_test:other")
        with pytest.raises(ValueError, match=r"got 'other'. It has none"):
            import_factory("data", "no_names_of_a_test:other")


class TestTorchvisionClasses:
    @pytest.fixture
    def images(self, monkeypatch):
        """A class of torchvision with made-up images."""
        mnist = pytest.importorskip("torchvision").datasets.MNIST

        def build(n, cls=mnist, **attributes):
            made = cls.__new__(cls)
            made.data = torch.randint(
                256, (n, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
            )
            made.targets = torch.arange(n) % N_CLASSES
            made.transform = made.target_transform = None
            vars(made).update(attributes)
            return made

        return build

    def flat(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, N_CLASSES))

    def test_images_are_normalized(self, load, images):
        task = load(lambda train: images(20 + train), self.flat)
        assert task.train.tensors[0].shape == (21, 1, 8, 8)
        assert task.train.tensors[0].dtype == torch.float32

    def test_labels_and_inputs_that_a_class_changes_are_read_from_its_examples(self, load, images):
        from torchvision.datasets import MNIST

        class Noisy(MNIST):
            def __getitem__(self, i):
                return self.data[i].float()[None], (int(self.targets[i]) + 1) % N_CLASSES

        task = load(lambda train: images(20 + train, Noisy), self.flat)
        assert task.train.tensors[1].tolist() == [(i + 1) % 3 for i in range(21)]
        flipped = load(
            lambda train: images(
                20 + train, transform=lambda x: torch.zeros(1, 8, 8), target_transform=lambda y: 2
            ),
            self.flat,
        )
        assert flipped.train.tensors[1].unique().tolist() == [2]

    def test_features_of_a_class_of_the_users_are_no_images(self, load):
        class Table(Dataset):
            def __init__(self, train):
                self.data, self.targets = xy(train)

            def __len__(self):
                return len(self.data)

            def __getitem__(self, i):
                return self.data[i], self.targets[i]

        assert torch.equal(load(Table).train.tensors[0], xy(True)[0])


def test_augmentation_in_a_subclass_of_a_tensor_dataset_is_noted(load):
    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn(x.shape), y

    assert "Inputs change whenever they are read" in load(lambda train: Noisy(*xy(train))).note


def test_examples_are_named_by_the_ids_of_the_data_set(load):
    class Named(TensorDataset):
        ids = tuple(f"{i}.png" for i in range(N))

    assert load(lambda train: Named(*xy(train)) if train else TensorDataset(*xy(train))).ids == Named.ids
    assert load(lambda train: TensorDataset(*xy(train))).ids is None
    Named.ids = Named.ids[1:]
    with pytest.raises(
        ValueError, match=f"`ids` must hold one for each of {N} training examples; got {N - 1}"
    ):
        load(lambda train: Named(*xy(train)) if train else TensorDataset(*xy(train)))


def test_a_draw_of_the_examples_keeps_their_ids(load):
    n = 1_500  # more than the preset takes, in the order of their classes

    class Named(TensorDataset):
        ids = np.arange(n) + 7

    def factory(train):
        y = torch.arange(n) * N_CLASSES // n
        x = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 6) / n
        return Named(x, y) if train else TensorDataset(*xy(train))

    task = load(factory, preset="smoke")
    places = (task.train.tensors[0][:, 0] * n).round().long()
    assert len(task.ids) == len(places) < n
    assert task.ids == tuple(str(int(i) + 7) for i in places)
