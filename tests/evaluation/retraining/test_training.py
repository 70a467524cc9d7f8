"""How one network is trained: seeds, batches of one example, one logit, and what is refused before a step."""

from __future__ import annotations

import functools
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum.evaluation.retraining import attributed_models as attributed_training
from stride_captum.evaluation.retraining.attributed_models import (
    DivergedError,
    even_epochs,
    train_attributed,
    train_checkpoints,
    train_spiked,
)
from stride_captum.evaluation.retraining.stacked import train_stacked
from stride_captum.evaluation.retraining.task_parts import cross_fit
from stride_captum.evaluation.retraining.training import logits_of, train_model
from stride_captum.evaluation.tasks.checks import check_task
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.new_network import checked_network, new_network, seeded
from stride_captum.evaluation.tasks.task import Task

SGD = TrainingSettings(optimizer="sgd", learning_rate=0.05, epochs=8, batch_size=4)
Y = torch.arange(30) % 3
X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(6)[Y]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def normalized():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def one_logit():
    return nn.Linear(6, 1)


class Returns(nn.Module):
    """A network that returns something made of its logits."""

    def __init__(self, of_logits, inner=mlp):
        super().__init__()
        self.inner, self.of_logits = inner(), of_logits

    def forward(self, x):
        return self.of_logits(self.inner(x))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def task_of(build_model=mlp, x=X, y=Y, **settings):
    data = TensorDataset(x, y)
    return Task("own", data, data, build_model, replace(SGD, **settings))


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


class TestBatchesOfOne:
    def test_every_example_is_a_step(self):
        """One epoch over one example at a time is the loop that anyone would write."""
        found = train_model(mlp, X, Y, replace(SGD, batch_size=1, epochs=1), seed=3)
        with seeded(3):
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), lr=SGD.learning_rate)
            for i in torch.randperm(30).tolist():
                optimizer.zero_grad()
                F.cross_entropy(model(X[i : i + 1]), Y[i : i + 1]).backward()
                optimizer.step()
        torch.testing.assert_close(weights(found), weights(model))

    def test_the_last_example_counts_but_where_batch_norm_cannot_normalize_it(self):
        seen = []

        def watched(build):
            model = build()
            model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
            return model

        settings = replace(SGD, batch_size=29, epochs=1)
        train_model(functools.partial(watched, mlp), X, Y, settings, 0)
        assert seen == [29, 1]
        train_model(functools.partial(watched, normalized), X, Y, settings, 0)
        assert seen[2:] == [29]

    @pytest.mark.parametrize(("build", "batch_size"), [(mlp, 1), (mlp, 4), (normalized, 4)])
    def test_stacks_do_the_same(self, build, batch_size):
        settings, rows = replace(SGD, batch_size=batch_size, epochs=2), np.arange(13)
        stack = train_stacked(lambda: build().double(), X.double(), Y, [rows, rows + 5], settings, (0, 1))
        for i in range(2):
            alone = train_model(
                lambda: build().double(), X[rows + 5 * i].double(), Y[rows + 5 * i], settings, i
            )
            torch.testing.assert_close(
                stack.logits(X.double())[i], logits_of(alone, X.double()), rtol=1e-9, atol=1e-10
            )

    def test_batch_norm_needs_two(self):
        with pytest.raises(
            ValueError, match="`batch_size` must be at least 2 for a network with BatchNorm; got a batch of 1"
        ):
            train_model(normalized, X, Y, replace(SGD, batch_size=1), 0)


class TestOneLogit:
    Y2 = (Y > 0).long()

    @pytest.mark.parametrize(
        "build",
        [
            one_logit,
            lambda: nn.Sequential(one_logit(), nn.Flatten(0)),
            lambda: Returns(torch.squeeze, one_logit),
        ],
        ids=["(n, 1)", "(n,)", "squeezed"],
    )
    @pytest.mark.parametrize("batch_size", [4, 29])  # 29 leaves one example, which squeezes to a number
    def test_the_loss_is_binary_cross_entropy(self, build, batch_size):
        settings = replace(SGD, batch_size=batch_size, epochs=2)
        found = train_model(build, X, self.Y2, settings, seed=1)
        with seeded(1):
            model = build()
            optimizer = torch.optim.SGD(model.parameters(), lr=SGD.learning_rate)
            for _ in range(2):
                for rows in torch.randperm(30).split(batch_size):
                    optimizer.zero_grad()
                    z = model(X[rows]).reshape(-1)
                    F.binary_cross_entropy_with_logits(z, self.Y2[rows].float()).backward()
                    optimizer.step()
        torch.testing.assert_close(weights(found), weights(model), rtol=1e-4, atol=1e-6)
        logits = logits_of(found, X)
        assert logits.shape == (30, 2)
        torch.testing.assert_close(
            logits[:, 1] - logits[:, 0], model(X).detach().reshape(-1), rtol=1e-4, atol=1e-5
        )

    def test_stacks_too(self):
        rows = np.arange(20)
        build = lambda: one_logit().double()  # noqa: E731
        stack = train_stacked(build, X.double(), self.Y2, [rows, rows + 10], SGD, (4, 5))
        for i in range(2):
            alone = train_model(build, X[rows + 10 * i].double(), self.Y2[rows + 10 * i], SGD, 4 + i)
            torch.testing.assert_close(
                stack.logits(X.double())[i], logits_of(alone, X.double()), rtol=1e-9, atol=1e-10
            )
        assert stack.logits(X.double()).shape == (2, 30, 2)


class TestWhatIsRefused:
    @pytest.fixture(params=["alone", "stacked"])
    def train(self, request):
        def alone(build, x=X, y=Y):
            train_model(build, x, y, SGD, 0)

        def stacked(build, x=X, y=Y):
            train_stacked(build, x, y, [np.arange(20), np.arange(10, 30)], SGD, (0, 1))

        return alone if request.param == "alone" else stacked

    def test_more_classes_than_logits(self, train):
        with pytest.raises(
            ValueError, match="`build_model` must give 3 logits, as the labels go up to 2; got 2"
        ):
            train(lambda: nn.Linear(6, 2))

    @pytest.mark.parametrize(
        ("inner", "last"), [(mlp, nn.Softmax(1)), (mlp, nn.Sigmoid()), (one_logit, nn.Sigmoid())]
    )
    def test_probabilities(self, train, last, inner):
        with pytest.raises(ValueError, match="`build_model` must return logits; got probabilities"):
            train(lambda: Returns(last, inner), y=(Y > 0).long())

    def test_log_probabilities_are_logits(self, train):
        train(lambda: Returns(nn.LogSoftmax(1)))

    def test_inputs_of_another_type_or_shape(self, train):
        with pytest.raises(
            ValueError, match=r"`build_model` must read inputs of shape \(\d+, 6\) in float64.*float32"
        ):
            train(mlp, X.double())
        with pytest.raises(
            ValueError, match=r"`build_model` must read inputs of shape \(\d+, 5\) in float32"
        ):
            train(mlp, X[:, :5])

    def test_no_memory_is_no_fault_of_the_inputs(self, train):
        def fails(z):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator: can't allocate memory$"):
            train(lambda: Returns(fails))

    def test_no_tensor(self, train):
        with pytest.raises(TypeError, match=r"`model` must return logits, or an object with .*got tuple"):
            train(lambda: Returns(lambda z: (z, z)))

    def test_rows_that_are_no_examples(self, train):
        with pytest.raises(ValueError, match="return one row of logits for each example; got 1 rows for"):
            train(lambda: Returns(lambda z: z[:1]))


def test_an_object_with_logits_is_read():
    found = train_model(lambda: Returns(lambda z: SimpleNamespace(logits=z)), X, Y, SGD, 0)
    assert torch.equal(weights(found), weights(train_model(lambda: Returns(lambda z: z), X, Y, SGD, 0)))
    assert logits_of(found, X).shape == (30, 3)


class TestSeeds:
    def drawn(self, draw):
        def build():
            model = mlp()
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.tensor([draw() for _ in range(p.numel())]).reshape(p.shape))
            return model

        return build

    @pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["NumPy", "random"])
    def test_first_weights_of_numpy_and_python_come_from_the_seed(self, draw):
        build = self.drawn(draw)
        one, two, other = (weights(train_model(build, X, Y, SGD, seed)) for seed in (5, 5, 6))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)
        stacks = [train_stacked(build, X, Y, [np.arange(20)] * 2, SGD, (5, 6)).logits(X) for _ in range(2)]
        assert torch.equal(*stacks)
        checked_network(build)

    def test_the_callers_states_stay(self):
        before = random_states()
        train_model(self.drawn(np.random.rand), X, Y, SGD, 1)
        train_stacked(self.drawn(random.random), X, Y, [np.arange(20)] * 2, SGD, (5, 6))
        checked_network(self.drawn(random.random))
        assert random_states() == before

    @pytest.mark.parametrize("own_seed", [0, 1234])
    def test_a_network_that_seeds_itself_is_named_and_its_batches_still_follow_the_seed(self, own_seed):
        def build():
            torch.manual_seed(own_seed)
            return mlp()

        with pytest.warns(
            UserWarning, match="The network seeds torch itself: .* Take the seed out of build_model"
        ):
            one = train_attributed(task_of(build), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not torch.equal(weights(one), weights(train_attributed(task_of(build), 1)))
        with seeded(7):
            order = [torch.randperm(9).tolist()]
        with seeded(7):
            new_network(build, 7)
            order.append(torch.randperm(9).tolist())
        assert order[0] == order[1]

    @pytest.mark.parametrize(
        ("seed", "name"),
        [(np.random.seed, "NumPy"), (random.seed, "Python's random")],
        ids=["NumPy", "random"],
    )
    def test_so_are_other_seeds(self, seed, name):
        def build():
            seed(3)
            return mlp()

        with pytest.warns(UserWarning, match=f"The network seeds {name} itself"):
            checked_network(build)

    def test_an_accelerator_of_apple_has_a_state_of_its_own(self, monkeypatch):
        states = ["of the caller"]
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
        monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
        monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: states.append(f"of seed {seed}"))
        with seeded(3, "mps"):
            assert states[-1] == "of seed 3"
        assert states[-1] == "of the caller"

    def test_pretrained_weights_are_no_seed(self):
        state = mlp().state_dict()

        def build():
            model = mlp()
            model.load_state_dict(state)
            return model

        checked_network(build)


class TestFactories:
    def test_weights_that_no_seed_reproduces(self):
        generator = np.random.default_rng()

        def build():
            model = mlp()
            model[0].bias.data = torch.from_numpy(generator.random(8)).float()
            return model

        with pytest.raises(
            ValueError, match="`build_model` must give the same first weights for the same seed"
        ):
            train_attributed(task_of(build), 0)

    def test_one_network_for_all_calls(self):
        model = mlp()
        with pytest.raises(
            ValueError, match=r"`build_model` must return a new network at each call; .*deepcopy"
        ):
            train_attributed(task_of(lambda: model), 0)

    def test_no_network(self):
        with pytest.raises(TypeError, match=r"`build_model` must return a torch.nn.Module; got type"):
            train_attributed(task_of(lambda: nn.Linear), 0)

    def test_lazy_modules(self):
        with pytest.raises(
            ValueError, match="`build_model` must return a network whose parameters have values"
        ):
            train_attributed(task_of(lambda: nn.LazyLinear(3)), 0)

    @pytest.mark.parametrize("build", [nn.Flatten, lambda: mlp().requires_grad_(False)])
    def test_nothing_to_train(self, build):
        with pytest.raises(
            ValueError, match="`build_model` must return a network with a parameter that can be"
        ):
            train_attributed(task_of(build), 0)


class RandomFeatures(nn.Module):
    """Random features that are drawn in the constructor and kept by `keep`."""

    def __init__(self, keep, head=nn.init.xavier_uniform_):
        super().__init__()
        keep(self, "features", torch.randn(6, 8))
        self.linear = nn.Linear(8, 3)
        head(self.linear.weight)

    def forward(self, x):
        return self.linear(torch.cos(x @ self.features))


def as_buffer(module, name, value, persistent=True):
    module.register_buffer(name, value, persistent=persistent)


class TestWeightsRestoreTheNetwork:
    """Stored weights are loaded into a network that was built under another seed."""

    @pytest.mark.parametrize("head", [nn.init.xavier_uniform_, nn.init.zeros_], ids=["", "zero head"])
    @pytest.mark.parametrize(
        "keep", [setattr, functools.partial(as_buffer, persistent=False)], ids=["attribute", "buffer"]
    )
    def test_random_values_outside_of_the_state_are_refused_before_training(self, keep, head, monkeypatch):
        def build():
            return nn.Sequential(RandomFeatures(keep, head))

        monkeypatch.setattr(
            attributed_training, "train_model", lambda *args, **kwargs: pytest.fail("trained")
        )
        sentence = (
            r"that its state_dict restores; got one with random values outside of it: '0\.features'\. "
            "Register them as a persistent buffer"
        )
        with pytest.raises(ValueError, match=sentence):
            train_attributed(task_of(build), 0)
        with pytest.raises(ValueError, match="that its state_dict restores"):
            cross_fit(task_of(build), 0, 1, None)
        with pytest.raises(ValueError, match="that its state_dict restores"):
            check_task(task_of(build))

    def test_a_persistent_buffer_comes_back(self, tmp_path):
        task = task_of(functools.partial(RandomFeatures, as_buffer))
        one, two = (train_attributed(task, 0, tmp_path) for _ in range(2))
        assert torch.equal(one(X), two(X))

    def test_values_that_outputs_do_not_depend_on_may_differ(self):
        def build():
            model = torch.nn.utils.weight_norm(nn.Linear(6, 3))
            model.name = f"network {torch.rand(())}"
            return model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch prefers its parametrizations
            checked_network(build, X[:2])

    def test_another_architecture_for_each_seed_is_refused(self):
        def build():
            width = 8 + int(torch.randint(1000, ()))
            return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3))

        with pytest.raises(ValueError, match="return networks of one architecture for all seeds; got size"):
            checked_network(build, X[:2])

    def test_the_callers_weights_do_not_change(self):
        model = mlp()
        before = weights(model)
        check_task(task_of(lambda: model))
        assert torch.equal(weights(model), before)


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"optimizer": "adamw"}, "`optimizer` must be one of 'adam', 'sgd'; got 'adamw'"),
            ({"epochs": 0}, "`epochs` must be an integer of at least 1; got 0"),
            ({"epochs": "2"}, "`epochs` must be an integer of at least 1; got '2'"),
            ({"epochs": True}, "`epochs` must be an integer of at least 1; got True"),
            ({"batch_size": 2.5}, "`batch_size` must be an integer of at least 1; got 2.5"),
            ({"learning_rate": -0.1}, "`learning_rate` must be a finite number, at least 0; got -0.1"),
            ({"learning_rate": "fast"}, "`learning_rate` must be a finite number, at least 0; got 'fast'"),
            ({"weight_decay": float("nan")}, "`weight_decay` must be a finite number, at least 0; got nan"),
            ({"momentum": None}, "`momentum` must be a finite number, at least 0; got None"),
            ({"momentum": 1}, "`momentum` must be below 1; got 1.0"),
        ],
    )
    def test_no_training_has_them(self, changes, sentence):
        with pytest.raises(ValueError, match=sentence):
            replace(SGD, **changes)

    def test_numbers_of_numpy_are_plain(self):
        found = replace(SGD, epochs=np.int64(3), learning_rate=np.float32(0.5))
        assert (type(found.epochs), type(found.learning_rate)) == (int, float)
        assert found == replace(SGD, epochs=3, learning_rate=0.5)


class TestAttributed:
    def test_a_training_that_diverges_says_so(self, tmp_path):
        task = task_of(x=X * 1e20, learning_rate=1e20)
        with pytest.raises(
            DivergedError, match=r"The training of own with seed 0 diverged: .*`learning_rate`"
        ):
            train_attributed(task, 0, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_spike_passes_over_seeds_that_diverge(self, monkeypatch):
        train = attributed_training.train_attributed

        def first_fails(task, seed, store, **options):
            if seed == 100:
                raise DivergedError
            return train(task, seed, store)

        monkeypatch.setattr(attributed_training, "train_attributed", first_fails)
        assert train_spiked(task_of(), threshold=0.0)[1] == 101

    @pytest.mark.parametrize("form", ["tied", "not contiguous"])
    def test_weights_of_all_forms_are_kept(self, tmp_path, form):
        task = task_of({"tied": tied, "not contiguous": transposed}[form])
        first, again = (train_attributed(task, 0, tmp_path) for _ in range(2))
        assert torch.equal(weights(first), weights(again))
        assert len(list(tmp_path.glob("attributed-*"))) == 1
        (state,) = train_checkpoints(task, 0, tmp_path, even_epochs(task.training.epochs, 1))
        assert state.keys() == first.state_dict().keys()

    def test_another_kind_of_device_has_another_name(self, tmp_path, monkeypatch):
        def on_the_cpu(*arguments, device, **options):
            assert device == "mps"
            return train_model(*arguments, **options)

        monkeypatch.setattr(attributed_training, "train_model", on_the_cpu)
        monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
        train_attributed(task_of(), 0, tmp_path, device="mps")
        monkeypatch.setattr(attributed_training, "train_model", train_model)
        train_attributed(task_of(), 0, tmp_path)
        assert len(list(tmp_path.glob("attributed-*"))) == 2


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def transposed():
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model
