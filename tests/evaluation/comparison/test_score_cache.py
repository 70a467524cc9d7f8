"""Answers of methods are kept on disk: asked once, never used for anything else."""

import dataclasses
import inspect
import json
import threading
import warnings

import numpy as np
import pytest
import torch
from captum.influence import SimilarityInfluence
from planted import MLP, planted_classes
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_captum import STRIDE, Batch, ClosedForm, Features, Partition, Ridge, Trained, adapters
from stride_captum.adapters import EKFAC, TRAK, CaptumInfluence, DiagonalEKFAC, Random, Similarity, TracIn
from stride_captum.evaluation.comparison.shared import score_cache, score_names
from stride_captum.evaluation.comparison.shared.methods import MethodSpec, adapter
from stride_captum.evaluation.comparison.shared.score_cache import CachedMethod
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task
from stride_captum.influence.checkpoints.checkpoint import Checkpoint, load_checkpoint
from stride_captum.influence.method import InfluenceMethod
from stride_captum.losses import CrossEntropy
from stride_captum.options import Options


@pytest.fixture
def task():
    settings = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=1)
    return Task("planted", planted_classes(30, seed=1), planted_classes(8, seed=2), MLP, settings)


@pytest.fixture
def model(task):
    torch.manual_seed(0)
    return task.build_model().eval()


@pytest.fixture
def batch(task):
    return task.test.tensors


def build(cls):
    return lambda model, data, options: cls(model, data, **options)


def kept(task, model, store, cls=DiagonalEKFAC, **options):
    return CachedMethod(build(cls), model, task, options, store, 0.5)


def never(method):
    raise AssertionError("it was asked again")


class TestKeeping:
    @pytest.mark.slow
    def test_what_is_there_is_neither_fitted_nor_asked_again(self, task, model, batch, tmp_path):
        first = kept(task, model, tmp_path)
        answer = first.margins(batch)
        expected = DiagonalEKFAC(model, task.train).influence(batch)
        np.testing.assert_array_equal(answer.values, expected.numpy())
        second = kept(task, model, tmp_path)
        again = second.margins(batch)
        np.testing.assert_array_equal(again.values, answer.values)
        assert again.values.dtype == answer.values.dtype
        assert not hasattr(second.method, "fit_seconds_")
        facts = [{k: v for k, v in vars(a).items() if k != "values"} for a in (answer, again)]
        assert facts[0] == facts[1]
        assert again.cost(8).fit_seconds == first.method.fit_seconds_
        assert again.cost(8).forward_seconds == 0.5

    @pytest.mark.slow
    def test_another_question_is_another_answer(self, task, model, batch, tmp_path):
        method = kept(task, model, tmp_path)
        plain = method.margins(batch).values
        assert not np.array_equal(plain, method.margins(batch, "cosine").values)
        assert len(method.margins((batch[0][:3], batch[1][:3])).values) == 3
        own = method.ask("self-influence", (), lambda m: m.self_influence()).values
        assert own.shape == (30,)
        assert len(list((tmp_path / "answers").iterdir())) == 4

    @pytest.mark.slow
    def test_settings_weights_and_data_make_another_method(self, task, model, batch, tmp_path):
        kept(task, model, tmp_path).ask("x", (), lambda m: np.ones(1))

        def asked_again(task, model, cls=DiagonalEKFAC, **options):
            with pytest.raises(AssertionError, match="asked again"):
                kept(task, model, tmp_path, cls, **options).ask("x", (), never)

        asked_again(task, model, damping=0.7)
        asked_again(task, model, STRIDE)
        torch.manual_seed(1)
        asked_again(task, task.build_model().eval())
        x, y = task.train.tensors
        other = Task("planted", TensorDataset(x + 1e-6, y), task.test, MLP, task.training)
        asked_again(other, model)
        kept(task, model, tmp_path).ask("x", (), never)

    @pytest.mark.slow
    def test_a_fit_that_refuses_an_option_leaves_the_names_as_they_are(self, task, model, batch, tmp_path):
        method = kept(task, model, tmp_path, TRAK, damping=0.0)
        with pytest.raises(ValueError, match="`damping` must be at least"):
            method.margins(batch)
        method.method.damping = 1.0
        method.ask("x", (), lambda m: np.ones(1))
        kept(task, model, tmp_path, TRAK, damping=1.0).ask("x", (), never)

    @pytest.mark.slow
    def test_an_option_that_is_set_on_a_fitted_method_counts(self, task, model, batch, tmp_path):
        pytest.importorskip("kronfluence")
        method = kept(task, model, tmp_path, EKFAC, damping=1e-3)
        weak = method.margins(batch).values
        method.method.damping = 10.0
        assert not np.array_equal(method.margins(batch).values, weak)
        assert len(list((tmp_path / "answers").iterdir())) == 2
        np.testing.assert_array_equal(
            kept(task, model, tmp_path, EKFAC, damping=10.0).margins(batch).values,
            method.margins(batch).values,
        )

    @pytest.mark.slow
    def test_other_code_is_another_method(self, task, model, batch, tmp_path, monkeypatch):
        kept(task, model, tmp_path).ask("x", (), lambda m: np.ones(1))
        monkeypatch.setattr(score_names, "_code", lambda: "another")
        with pytest.raises(AssertionError, match="asked again"):
            kept(task, model, tmp_path).ask("x", (), never)

    @pytest.mark.slow
    @pytest.mark.parametrize("content", [b"", b"\x10", None])
    def test_a_damaged_file_is_computed_again(self, task, model, batch, tmp_path, content):
        answer = kept(task, model, tmp_path).margins(batch)
        (path,) = (tmp_path / "answers").iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[:-7] if content is None else content)
        with pytest.warns(UserWarning, match="is cut off or not an answer: it is computed again"):
            again = kept(task, model, tmp_path).margins(batch)
        np.testing.assert_array_equal(again.values, answer.values)
        assert json.dumps(kept(task, model, tmp_path).margins(batch).values.tolist())

    @pytest.mark.slow
    def test_without_a_store_nothing_is_written(self, task, model, batch, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        kept(task, model, None).margins(batch)
        assert not list(tmp_path.iterdir())


class TestSeveralNormalizations:
    HOW = (None, "deviation")

    @pytest.fixture
    def counted(self, monkeypatch):
        """Test points that were prepared, once for each checkpoint."""
        seen = []
        prepare = Similarity.prepare_query

        def counting(method, state, model, batch, query):
            seen.append(len(batch))
            return prepare(method, state, model, batch, query)

        monkeypatch.setattr(Similarity, "prepare_query", counting)
        return seen

    def states(self, task):
        found = []
        for factor in (1.0, 5.0):
            state = task.build_model().state_dict()
            found.append({name: factor * value for name, value in state.items()})
        return found

    def test_one_pass_serves_all_of_them(self, task, model, batch, tmp_path, counted):
        states = self.states(task)
        answers = kept(task, model, tmp_path, Similarity, checkpoints=states).margins_each_way(
            batch, self.HOW
        )
        assert counted == [len(batch[1])] * 2
        method = Similarity(model, task.train, checkpoints=states)
        for how, answer in zip(self.HOW, answers, strict=True):
            np.testing.assert_array_equal(answer.values, method.influence(batch, normalize=how).numpy())
            assert answer.seconds > 0
        assert not np.array_equal(answers[0].values, answers[1].values)
        counted.clear()
        for how, answer in zip(self.HOW, answers, strict=True):
            again = kept(task, model, tmp_path, Similarity, checkpoints=states).margins(batch, how)
            np.testing.assert_array_equal(again.values, answer.values)
        assert not counted

    def test_only_what_is_missing_is_computed(self, task, model, batch, tmp_path, counted):
        plain = kept(task, model, tmp_path, Similarity).margins(batch)
        (path,) = (tmp_path / "answers").iterdir()
        written = path.stat().st_mtime_ns
        counted.clear()
        first, second = kept(task, model, tmp_path, Similarity).margins_each_way(batch, self.HOW)
        assert counted == [len(batch[1])]
        assert path.stat().st_mtime_ns == written
        np.testing.assert_array_equal(first.values, plain.values)
        method = Similarity(model, task.train)
        np.testing.assert_array_equal(second.values, method.influence(batch, normalize="deviation").numpy())

    def test_a_cosine_is_not_taken_from_scores(self, task, model, batch, tmp_path):
        plain, cosine = kept(task, model, tmp_path, TracIn).margins_each_way(batch, (None, "cosine"))
        method = TracIn(model, task.train)
        np.testing.assert_array_equal(plain.values, method.influence(batch).numpy())
        np.testing.assert_array_equal(cosine.values, method.influence(batch, normalize="cosine").numpy())

    def test_a_damaged_file_is_said_once(self, task, model, batch, tmp_path):
        kept(task, model, tmp_path, Similarity).margins(batch)
        (path,) = (tmp_path / "answers").iterdir()
        path.write_bytes(b"")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kept(task, model, tmp_path, Similarity).margins(batch)
        assert len(said) == 1

    def test_a_method_with_an_influence_of_its_own_is_asked_for_each(self, task, model, batch, tmp_path):
        class Own(Similarity):
            def influence(self, inputs, *args, normalize=None, **options):
                found = super().influence(inputs, *args, normalize=normalize, **options)
                return found + (7 if normalize else 3)

        answers = kept(task, model, tmp_path, Own).margins_each_way(batch, self.HOW)
        method = Own(model, task.train)
        for how, answer in zip(self.HOW, answers, strict=True):
            np.testing.assert_array_equal(answer.values, method.influence(batch, normalize=how).numpy())


class Picky(Similarity):
    """Refuses to be fitted."""

    def fit_checkpoint(self, model, show_progress):
        raise ValueError("`damping` must be larger")


class TestRefusals:
    @pytest.fixture
    def refused(self, task, model, batch, monkeypatch):
        """Whether a method in a store is fitted before it refuses, and what it says."""
        fits = []
        fit = Picky.fit
        monkeypatch.setattr(Picky, "fit", lambda method, *args: (fits.append(1), fit(method, *args)))

        def found(store, **options):
            fits.clear()
            with pytest.raises(ValueError, match="`damping` must be larger") as error:
                kept(task, model, store, Picky, **options).tried(batch, [None])
            return bool(fits), str(error.value)

        return found

    def test_that_options_are_refused_is_kept(self, tmp_path, refused):
        first = refused(tmp_path)
        assert first == (True, "`damping` must be larger")
        (mark,) = (tmp_path / "answers").iterdir()
        assert refused(tmp_path) == (False, f"{first[1]} (kept in {mark})")
        assert refused(tmp_path, batch_size=7) == first
        mark.unlink()
        assert refused(tmp_path) == first

    def test_under_a_key_that_does_not_change_with_the_code_it_is_not_kept(
        self, task, model, batch, tmp_path
    ):
        spec = MethodSpec("picky", adapter(Picky), cache_key="mine")
        with pytest.raises(ValueError, match="must be larger"):
            CachedMethod(spec, model, task, {}, tmp_path, 0.5).tried(batch, [None])
        assert not list(tmp_path.rglob("*.refused"))

    def test_errors_of_the_store_are_no_refusals(self, task, model, batch, tmp_path, monkeypatch):
        def fails(path, answer):
            raise ValueError("no space")

        monkeypatch.setattr(score_cache, "write_answer", fails)
        with pytest.raises(ValueError, match="no space"):
            kept(task, model, tmp_path, Similarity).tried(batch, [None])
        assert not list(tmp_path.rglob("*.refused"))

    def test_without_a_store_it_is_found_anew(self, refused):
        assert refused(None) == refused(None) == (True, "`damping` must be larger")


def name_of(task, model, store, cls, **options):
    """The file of a question, which is not asked."""
    path = kept(task, model, store, cls, **options)._path("question", ())
    assert path is not None
    return path.name


class Examples(Dataset):
    """Examples that are not among its attributes."""

    def __init__(self, task, shift):
        self.read = lambda i: (task.test.tensors[0][i] + shift, task.test.tensors[1][i])

    def __len__(self):
        return len(self.read(slice(None))[0])

    def __getitem__(self, i):
        return self.read(i)


def similar_by(layer):
    def build(model, train):
        return SimilarityInfluence(model, layer, train, "none", batch_size=16)

    return build


def rate_of(rate):
    def load(model, checkpoint):
        model.load_state_dict(checkpoint)
        return rate

    return load


#: What each constructor argument is changed to; a function of the task and the model where it needs them.
CHANGED = {
    "answers": "similarity",
    "batch": Batch(label_key=-1),
    "batch_size": 7,
    "build": lambda task, model: similar_by("relu1"),
    "checkpoints": lambda task, model: [{k: v + 1 for k, v in model.state_dict().items()}],
    "checkpoints_load_func": lambda task, model: rate_of(0.5),
    "damping": 0.25,
    "dense": "diagonal",
    "device": "cpu",
    "fast": True,
    "feature_store": "somewhere",
    "fisher": "empirical",
    "held_out": lambda task, model: task.test,
    "k": 3,
    "layers": ["relu1"],
    "learning_rates": [0.5],
    "loss": CrossEntropy(outputs="probabilities"),
    "memory_budget": "1MiB",
    "n_fisher": 17,
    "normalize": "cosine",
    "orientation": "train-test",
    "projection_dim": 12,
    "relative": False,
    "residuals": "temperature",
    "response": "logit",
    "seed": 3,
    "operators": "trained",
    "features": Features(select="penultimate"),
    "ids": lambda task, model: range(task.n_train),
    "sign": -1,
    "strategy": "kfac",
    "target": "predicted",
    "temperature": 3.0,
}
#: What else an argument needs.
BESIDE = {
    ("CaptumInfluence", None): {"build": similar_by("relu2"), "answers": "similarity"},
    ("CaptumInfluence", "answers"): {"answers": "logit"},
    ("CaptumInfluence", "residuals"): {"answers": "every"},
    ("CaptumInfluence", "temperature"): {"answers": "every"},
}
#: Refused by the class, and tested there.
NONE = {("CaptumInfluence", "layers")}
CHANGED_OPTIONS = {
    "alpha": 0.2,
    "center": False,
    "curvature": "identity",
    "encoder": "per-subset",
    "form": "rows",
    "linearity": "example",
    "precision": "tf32",
    "preset": "mnist",
    "projection": "random",
    "recovery": Ridge(),
    "residuals": "training",
    "schedule": "constant",
    "select": "penultimate",
    "size": 9,
    "steering": "representation",
    "subsets": Partition(50),
    "temperature": 3.0,
}


def changed_options(value):
    """Copies of an option object, and of those in it, with one option changed each."""
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        new = CHANGED_OPTIONS[field.name] if field.name in CHANGED_OPTIONS else old + 1
        yield field.name, dataclasses.replace(value, **{field.name: new})
        if isinstance(old, Options):
            for name, part in changed_options(old):
                yield f"{field.name}.{name}", dataclasses.replace(value, **{field.name: part})


METHODS = [STRIDE, *(getattr(adapters, name) for name in adapters.__all__)]
METHODS = [cls for cls in METHODS if issubclass(cls, InfluenceMethod)]


def arguments_of(cls):
    """Every argument that a constructor takes, also by way of those above it."""
    return {
        name
        for above in cls.__mro__
        if "__init__" in vars(above) and above.__module__.startswith("stride_captum")
        for name, p in inspect.signature(above).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }


class TestEveryArgument:
    @pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
    def test_of_every_method_is_part_of_the_name(self, task, model, tmp_path, cls):
        if cls is EKFAC:
            pytest.importorskip("kronfluence")
        names = {}
        arguments = arguments_of(cls)
        usual = BESIDE.get((cls.__name__, None), {})
        for argument in arguments:
            if (cls.__name__, argument) in NONE:
                continue
            value = CHANGED[argument]
            value = value(task, model) if inspect.isfunction(value) else value
            beside = {**usual, **BESIDE.get((cls.__name__, argument), {})}
            if argument == "checkpoints_load_func":
                beside["checkpoints"] = [model.state_dict()]
            before = name_of(task, model, tmp_path, cls, **beside)
            names[argument] = name_of(task, model, tmp_path, cls, **{**beside, argument: value})
            assert before != names[argument], argument
        assert len(set(names.values())) == len(names)

    @pytest.mark.parametrize("before", [ClosedForm(), Trained(), Features()], ids=lambda value: value.name)
    def test_every_option_is_part_of_the_name(self, task, model, tmp_path, before):
        argument = "features" if isinstance(before, Features) else "operators"
        names = {
            option: name_of(task, model, tmp_path, STRIDE, **{argument: value})
            for option, value in changed_options(before)
        }
        usual = name_of(task, model, tmp_path, STRIDE, **{argument: before})
        assert len({usual, *names.values()}) == 1 + len(names)

    def test_what_is_given_as_it_is_by_default_changes_nothing(self, task, model, tmp_path):
        given = {"operators": ClosedForm(), "held_out": None, "checkpoints_load_func": load_checkpoint}
        assert name_of(task, model, tmp_path, STRIDE, **given) == name_of(task, model, tmp_path, STRIDE)


class TestContent:
    """What a name depends on beyond the values of plain options."""

    def test_held_out_data(self, task, model, tmp_path):
        x, y = task.test.tensors

        def name(held_out):
            return name_of(task, model, tmp_path, STRIDE, held_out=held_out)

        one = name(TensorDataset(x, y))
        assert name(TensorDataset(x.clone(), y.clone())) == one
        assert name(TensorDataset(x, (y + 1) % 3)) != one
        assert name(Examples(task, 0.0)) != name(Examples(task, 1.0))
        assert name(DataLoader(Examples(task, 0.0))) != name(DataLoader(Examples(task, 1.0)))
        assert name((x, y)) != name((x + 1, y))

    def test_training_data_that_a_method_wraps(self, task, model, tmp_path):
        def name(shift):
            def make(model, data, options):
                return Random(model, Examples(task, shift))

            return CachedMethod(make, model, task, {}, tmp_path, 1.0)._path("question", ())

        assert name(0.0) == name(0.0) != name(1.0)

    def test_code_and_closures_of_callables(self, task, model, tmp_path):
        def name(build):
            return name_of(task, model, tmp_path, CaptumInfluence, build=build, answers="similarity")

        assert name(similar_by("relu1")) == name(similar_by("relu1")) != name(similar_by("relu2"))
        assert name(lambda model, train: similar_by("relu1")(model, train)) != name(similar_by("relu1"))

    def test_learning_rates_and_weights_that_a_function_loads(self, task, model, tmp_path):
        state = {k: v + 1 for k, v in model.state_dict().items()}
        before = {k: v.clone() for k, v in model.state_dict().items()}

        def name(checkpoint, load):
            options = {"checkpoints": [checkpoint], "checkpoints_load_func": load}
            return name_of(task, model, tmp_path, TracIn, **options)

        def load(model, checkpoint):  # as Captum's own loaders, which find the rate in the checkpoint
            model.load_state_dict(checkpoint["weights"])
            return checkpoint["learning_rate"]

        one = name(state, rate_of(0.1))
        assert one == name({k: v.clone() for k, v in state.items()}, rate_of(0.1))
        assert one != name(state, rate_of(0.2))
        assert one != name({**state, "fc1.bias": state["fc1.bias"] + 1}, rate_of(0.1))
        names = [name({"weights": state, "learning_rate": rate}, load) for rate in (0.1, 0.2, 0.1)]
        assert names[0] == names[2] != names[1]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.slow
    def test_the_examples_that_a_checkpoint_has_seen(self, task, model, batch, tmp_path):
        def of(seen):
            checkpoints = [Checkpoint(model.state_dict(), seen=seen)]
            return kept(task, model, tmp_path, STRIDE, operators=ClosedForm(), checkpoints=checkpoints)

        every, half = (of(seen).margins(batch).values for seen in (None, range(0, 30, 2)))
        assert not np.array_equal(every, half)
        assert len(list((tmp_path / "answers").iterdir())) == 2
        again = of(list(range(0, 30, 2)))
        np.testing.assert_array_equal(again.margins(batch).values, half)
        assert not hasattr(again.method, "fit_seconds_")

    def test_checkpoints_on_disk(self, task, model, tmp_path):
        path = tmp_path / "checkpoint.pt"
        names = []
        for shift in (0.0, 1.0, 0.0):
            torch.save({k: v + shift for k, v in model.state_dict().items()}, path)
            names.append(name_of(task, model, tmp_path, TracIn, checkpoints=[str(path)]))
        assert names[0] == names[2] != names[1]

    def test_the_forward_pass_of_the_model(self, task, model, tmp_path):
        class Other(MLP):
            def forward(self, x):
                return super().forward(x).tanh()

        other = Other().eval()
        other.load_state_dict(model.state_dict())
        assert name_of(task, other, tmp_path, STRIDE) != name_of(task, model, tmp_path, STRIDE)

    @pytest.mark.slow
    def test_code_of_a_class_of_the_user(self, task, model, batch, tmp_path):
        def mine(sign):
            class Mine(Random):
                def influence(self, *args, **kwargs):
                    return sign * super().influence(*args, **kwargs)

            return Mine

        one = kept(task, model, tmp_path, mine(1)).margins(batch).values
        np.testing.assert_array_equal(kept(task, model, tmp_path, mine(-1)).margins(batch).values, -one)
        kept(task, model, tmp_path, mine(1)).ask("margin of the label, normalize=None", batch, never)

    def test_sources_in_folders_below(self, tmp_path):
        below = tmp_path / "operators" / "closed.py"
        below.parent.mkdir()
        below.write_text("damping = 1")
        before = score_names._sources(tmp_path)
        below.write_text("damping = 2")
        assert score_names._sources(tmp_path) != before


class WithALock(Random):
    def __init__(self, model, train_dataset, *, log, **options):
        super().__init__(model, train_dataset, **options)
        self.log = log


class TestNoDigest:
    @pytest.fixture
    def row(self):
        return MethodSpec("mine", lambda model, data, options: WithALock(model, data, log=[lock], **options))

    @pytest.mark.slow
    def test_nothing_is_kept_and_one_line_says_which_part(self, task, model, batch, tmp_path, row):
        method = CachedMethod(row, model, task, {}, tmp_path, 1.0)
        with pytest.warns(UserWarning, match="not cached") as said:
            values = method.margins(batch).values
        method.margins(batch)  # says nothing more
        assert [str(warning.message) for warning in said] == [
            "The scores of WithALock are not cached: `log[0]` is of type lock, whose content cannot be read. "
            "Build it without that, or give its MethodSpec a `cache_key` that changes whenever its "
            "scores do."
        ]
        np.testing.assert_array_equal(values, Random(model, task.train).influence(batch).numpy())
        assert not (tmp_path / "answers").exists()

    @pytest.mark.slow
    def test_the_author_may_vouch(self, task, model, batch, tmp_path, row):
        vouched = dataclasses.replace(row, cache_key="first")

        def name(row=vouched, model=model, task=task, **options):
            return CachedMethod(row, model, task, options, tmp_path, 1.0)._path("question", ())

        one = name()
        assert one == name()
        torch.manual_seed(1)
        x, y = task.train.tensors
        others = [
            name(dataclasses.replace(row, cache_key="second")),
            name(model=MLP().eval()),
            name(task=dataclasses.replace(task, train=TensorDataset(x, y.flip(0)))),
            name(seed=3),
        ]
        assert len({one, *others}) == 5
        method = CachedMethod(vouched, model, task, {}, tmp_path, 1.0)
        values = method.margins(batch).values
        CachedMethod(vouched, model, task, {}, tmp_path, 1.0).ask(
            "margin of the label, normalize=None", batch, never
        )
        method.method.seed = 5  # as a grid over what needs no new fit sets it
        method.method.fit()
        assert not np.array_equal(method.margins(batch).values, values)


lock = threading.Lock()
