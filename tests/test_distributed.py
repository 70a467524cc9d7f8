"""Two and four gloo processes give what one process gives, and say so where they cannot."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from flat_options import arguments
from planted import MLP, HuggingFaceLike, ListOfDicts, built, loader, planted_classes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from typer.testing import CliRunner

from stride_captum import STRIDE, Batch, Checkpoint, ClosedForm, Features, Trained, result_rows
from stride_captum.__main__ import main
from stride_captum.conformance.toy_problems import IGNORED, posed_with
from stride_captum.distributed import DistributedSTRIDE
from stride_captum.evaluation.cli.app import app
from stride_captum.features.store import FeatureStore
from stride_captum.influence.top_k import merge_top_k
from stride_captum.losses import CrossEntropy

pytestmark = pytest.mark.xdist_group("processes")

N_TRAIN = 47  # no multiple of 2 or 4
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stride_captum.evaluation.cli.app", "planted", "pytest"])


def data_and_model():
    """Not trained: the optimizers of torch take a second to import in every process."""
    return built(MLP), planted_classes(N_TRAIN), planted_classes(7, seed=1)


def in_double():
    model, train, test = data_and_model()
    double = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, test)]
    return model.double(), *double


def answers(method, batch) -> dict[str, Tensor]:
    """What one can ask, by name."""
    best, worst = method.influence(batch, 5), method.influence(batch, 5, False)
    every = method.influence(batch, N_TRAIN + 1)
    return {
        "dense": method.influence(batch),
        "predicted logit": method.influence(batch, response="logit", target="predicted"),
        "cosine": method.influence(batch, normalize="cosine"),
        "deviation": method.influence(batch, normalize="deviation"),
        "cosine, best": method.influence(batch, 3, normalize="cosine").indices,
        "best": best.indices,
        "best scores": best.influence_scores,
        "worst": worst.indices,
        "worst scores": worst.influence_scores,
        "all in order": every.indices,
        "groups": method.subset_influence(batch, [[0, 46, 23], range(30), [45]]),
        "self-influence": method.self_influence(),
        "self-influence of others": method.self_influence(batch),
        "mislabel": method.mislabel_scores(),
        "temperature": torch.tensor([method.temperature_]),
        "coverage": method.coverage_,
    }


def of_config(**options):
    def run(cls):
        model, train, test = data_and_model()
        return answers(cls(model, train, batch_size=9, **arguments(**options)), test.tensors)

    return run


def of_double(cls):
    model, train, test = in_double()
    return answers(cls(model, train, operators=ClosedForm(curvature="eigenvalue-corrected")), test.tensors)


def of_held_out(cls):
    model, train, test = data_and_model()
    return answers(cls(model, train, held_out=planted_classes(30, seed=9)), test.tensors)


def of_loaders(cls):
    model, train, test = data_and_model()
    method = cls(model, DataLoader(train, batch_size=6, drop_last=True), layers=["fc1", "fc2"])
    return {"dense": method.influence(loader(test)), "best": method.influence(loader(test), 4).indices}


def of_dicts(cls):
    train, test = ListOfDicts(N_TRAIN), ListOfDicts(5, seed=1)
    return {"dense": cls(built(HuggingFaceLike), train).influence(test)}


def of_weights(cls):
    model, train, test = data_and_model()
    weights = torch.linspace(0.1, 2, N_TRAIN)
    return answers(cls(model, train, batch=Batch(sample_weight=weights)), test.tensors)


def of_weights_in_the_data(cls):
    model, train, test = data_and_model()
    x, y = train.tensors
    method = cls(model, TensorDataset(x, torch.linspace(0.1, 2, N_TRAIN), y), batch=Batch(sample_weight=1))
    return {"dense": method.influence((test.tensors[0], torch.ones(7), test.tensors[1]))}


def of_ids(cls):
    model, train, test = data_and_model()
    method = cls(model, train, ids=[f"image {i}" for i in range(N_TRAIN)])
    rows = result_rows(method, method.influence(test.tensors, N_TRAIN), as_frame=False)
    named = [(int(row["id"].split()[1]), row["train"], row["label"]) for row in rows]
    assert all(name == train for name, train, _ in named)
    return {"named": torch.tensor(sorted(named))}


def of_checkpoints(cls):
    model, train, test = data_and_model()
    weights = [model.state_dict(), built(MLP, seed=2).state_dict()]
    return answers(cls(model, train, checkpoints=weights), test.tensors)


def of_halves(cls):
    """`mislabel_scores` where every example is unseen by a model, and where those of one share are not."""
    model, train, _ = data_and_model()
    states = [model.state_dict(), built(MLP, seed=2).state_dict()]
    found = {}
    for name, halves in {
        "all unseen": [range(0, N_TRAIN, 2), range(1, N_TRAIN, 2)],
        "some seen by all": [range(0, N_TRAIN - 3), range(3, N_TRAIN)],
        "a share seen by all": [range(20, N_TRAIN), [*range(19), *range(20, N_TRAIN)]],
    }.items():
        halves = [Checkpoint(state, seen=list(half)) for state, half in zip(states, halves, strict=True)]
        found[name] = cls(model, train, checkpoints=halves).mislabel_scores()
    return found


def of_vectors(cls):
    model, train, test = data_and_model()
    method = cls(model, train, checkpoints=[model.state_dict(), built(MLP, seed=2).state_dict()])
    few, many = [40, 0, 23], range(N_TRAIN)
    return {
        "test": method.compute_intermediate_quantities(test.tensors),
        "few": method.compute_intermediate_quantities(few, side="train"),
        "many": method.compute_intermediate_quantities(many, aggregate=True, side="train"),
        "last": method.compute_intermediate_quantities([46], side="train"),
    }


def of_features(cls):
    model, train, test = data_and_model()
    x, y = train.tensors
    with torch.no_grad():
        method = cls.from_features(x.numpy(), model(x), y)
        return answers(method, (test.tensors[0], model(test.tensors[0]), test.tensors[1]))


def tokens():
    """Examples have 0 to 4 labels; those of the first of four ranks, and the last of them, have none."""
    with posed_with("positions"):
        model, train, test = built(MLP), planted_classes(N_TRAIN), planted_classes(7, seed=1)
    y, asked = train.tensors[1], test.tensors[1]
    for labels, rows in ((y, slice(12)), (y, 46), (y, (20, slice(1, 4))), (asked, 2), (asked, (4, slice(2)))):
        labels[rows] = IGNORED
    double = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, test)]
    return model.double(), *double


def of_positions(form="rows", data=lambda train: train, **options):
    def run(cls):
        model, train, test = tokens()
        names = ("residuals", "curvature")
        own = {name: options[name] for name in names if name in options}
        others = {name: value for name, value in options.items() if name not in names}
        operators = ClosedForm(form=form, **own)
        train, budget = data(train), 2**14  # several blocks, and test points in several parts
        method = cls(model, train, batch_size=5, operators=operators, memory_budget=budget, **others)
        found = answers(method, test.tensors)
        assert method.operators_.form == form.replace("auto", "matrix")
        return found | parts(method, test.tensors)

    return run


def parts(method, batch) -> dict[str, Tensor]:
    """What one can ask where examples have several positions."""
    found = {
        "positions": method.influence(batch, per_position=True).flatten(1),
        "vectors of test points": method.compute_intermediate_quantities(batch),
        "vectors": method.compute_intermediate_quantities([40, 0, 23], side="train"),
        "vector": method.compute_intermediate_quantities([46], side="train"),
    }
    if method.operators_.form == "rows":
        found |= {f"positions of {i}": method.positions_of(batch, i) for i in (13, 20, 30, 40)}
    return found


class OfOtherLengths(Dataset):
    """The examples without their last positions, as many as their number says."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        x, y = self.examples[i]
        return x[: 1 + i % 4], y[: 1 + i % 4]


def padded(examples):
    x, y = zip(*examples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(x, batch_first=True), pad(y, batch_first=True, padding_value=IGNORED)


def all_labeled(train):
    return TensorDataset(train.tensors[0], train.tensors[1].clamp_min(0))


def of_lengths(train):
    return DataLoader(OfOtherLengths(train), 5, collate_fn=padded)


def of_halves_of_positions(cls):
    model, train, test = tokens()
    states = [model.state_dict(), {name: part / 2 for name, part in model.state_dict().items()}]
    halves = [range(0, N_TRAIN, 2), range(1, N_TRAIN, 2)]
    checkpoints = [Checkpoint(s, seen=list(half)) for s, half in zip(states, halves, strict=True)]
    method = cls(model, train, checkpoints=checkpoints, operators=ClosedForm(form="matrix"))
    return answers(method, test.tensors)


def of_kept_positions(cls):
    """From a feature store, saved and loaded again."""
    model, train, test = tokens()
    train, test = (TensorDataset(d.tensors[0].float(), d.tensors[1]) for d in (train, test))
    found = {}
    for form in ("rows", "matrix"):
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "operators": ClosedForm(form=form),
                "feature_store": f"{folder}/store",
                "batch_size": 7,
            }
            cls(model.float(), train, **options).fit().save(f"{folder}/method")
            method = cls.load(f"{folder}/method", model, train)
            found |= {f"{name} of {form}": value for name, value in answers(method, test.tensors).items()}
    return found


CASES = {
    "default": of_config(),
    "identity": of_config(curvature="identity", residuals="temperature"),
    "eigenvalue-corrected": of_config(curvature="eigenvalue-corrected", residuals="leave-one-out"),
    "many ties": of_config(threshold=0.02),
    "double": of_double,
    "held-out": of_held_out,
    "loaders": of_loaders,
    "dicts": of_dicts,
    "weights": of_weights,
    "weights in the data": of_weights_in_the_data,
    "ids": of_ids,
    "checkpoints": of_checkpoints,
    "halves": of_halves,
    "vectors": of_vectors,
    "features": of_features,
    "kept positions": of_kept_positions,
}

#: In float64, as "double" is.
OF_POSITIONS = {
    "rows": of_positions(),
    "matrix": of_positions("matrix"),
    "auto": of_positions("auto", all_labeled, curvature="identity", residuals="temperature"),
    "corrected": of_positions(curvature="eigenvalue-corrected", residuals="leave-one-out"),
    "weights of positions": of_positions(
        batch=Batch(sample_weight=torch.linspace(0, 2, 4 * N_TRAIN).reshape(N_TRAIN, 4))
    ),
    "weights of classes": of_positions("matrix", loss=CrossEntropy(weight=[1.0, 2.0, 0.5])),
    "lengths": of_positions(data=of_lengths),
    "halves of positions": of_halves_of_positions,
}
CASES |= OF_POSITIONS


# What runs in the processes.


def enter(rank, size, work, method, timeout, queue, arguments):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=limit)
    try:
        queue.put((rank, work(rank, *arguments)))
    except Exception:
        queue.put((rank, traceback.format_exc()))
    queue.close()
    queue.join_thread()
    os._exit(0)


def start(size, work, *arguments, folder, timeout=60, method=None, survivors=None):
    """Run `work(rank, *arguments)` in `size` processes; gives what the `survivors` return, by rank."""
    queue = CONTEXT.Queue()
    method = method or f"file://{folder}/init-{time.monotonic_ns()}"
    processes = [
        CONTEXT.Process(target=enter, args=(rank, size, work, method, timeout, queue, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(queue.get(timeout=50) for _ in range(survivors or size))
        assert not any(str(result).startswith("Traceback") for result in found.values()), found
        return found
    finally:
        for process in processes:
            process.join(1 if survivors is None else 0.1)
            process.kill()
            process.join()


def all_cases(rank):
    found = {
        name: {key: value.numpy() for key, value in case(DistributedSTRIDE).items()}
        for name, case in CASES.items()
    }
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def single():
    return {name: case(STRIDE) for name, case in CASES.items()}


def differences(single, found):
    """Largest difference in each case, in units of the largest score of its row."""
    worst = {}
    for rank, cases in found.items():
        for case, answers_of_case in cases.items():
            for name, value in answers_of_case.items():
                wanted, value = single[case][name], torch.from_numpy(value)
                assert value.shape == wanted.shape, (rank, case, name)
                assert value.dtype == wanted.dtype, (rank, case, name)
                if not value.is_floating_point():
                    assert torch.equal(value, wanted), (rank, case, name)
                    continue
                largest = wanted.abs().amax(-1, keepdim=True)
                error = float(((value - wanted).abs() / largest.where(largest > 0, 1.0)).max())
                worst[case] = max(worst.get(case, 0.0), error)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_have_the_answers_of_one_process(single, tmp_path, size):
    worst = differences(single, start(size, all_cases, folder=tmp_path))
    exact = {name: worst.pop(name) for name in ("double", *OF_POSITIONS)}
    assert max(exact.values()) < 1e-12, exact
    assert worst.keys() == CASES.keys() - {"ids"} - exact.keys()
    assert max(worst.values()) < 5e-6, worst


def test_ties_between_lists_go_to_the_lower_index():
    indices = torch.tensor([[4, 9, 0, 2]])
    scores = torch.tensor([[1.0, 0.5, 1.0, 0.5]])
    for largest in (True, False):
        found = merge_top_k(indices, scores if largest else -scores, 3, largest)
        assert found[0].tolist() == [[0, 4, 2]]
        assert found[1].abs().tolist() == [[1.0, 1.0, 0.5]]
    assert merge_top_k(indices, scores, 9, True)[0].tolist() == [[0, 4, 2, 9]]


# One rank reads its share only; what differs between ranks is refused.


class Counting(TensorDataset):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = set()

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)


def said(call) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "nothing"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def one_after_the_other(rank, folder):
    """Every case has a group of its own: one that has failed is not used again."""

    def method(model=None, train=None, **options):
        return DistributedSTRIDE(model or mlp, train or whole, process_group=dist.new_group(), **options)

    mlp, whole, test = data_and_model()
    found = {}
    counting = Counting(*whole.tensors)
    reader = method(train=counting)
    reader.fit()
    found["read"] = sorted(counting.read), (reader.columns.start, reader.columns.stop)
    reader.save(f"{folder}/method")
    loaded = DistributedSTRIDE.load(f"{folder}/method", mlp, counting, process_group=reader.ranks.group)
    found["loaded"] = torch.equal(loaded.influence(test.tensors), reader.influence(test.tensors))
    found["no file"] = said(lambda: DistributedSTRIDE.load(f"{folder}/other", mlp, whole))
    other = torch.tensor([[5.0] * 6]), torch.tensor([0])
    asked = test.tensors if rank == 0 else (other[0].expand(7, 6), other[1].expand(7))
    found["queries are those of rank 0"] = reader.influence(asked)[0, :3].tolist()
    found["few"] = said(lambda: method(train=TensorDataset(*whole[:1])))
    found["stream"] = said(lambda: method(train=Stream()))
    found["trained"] = said(lambda: method(operators=Trained()))
    found["gauss-newton"] = said(lambda: method(operators=ClosedForm(curvature="gauss-newton")))
    found["projection"] = said(lambda: method(features=Features(projection="random")))
    found["batch"] = said(lambda: method(train=whole.tensors))
    found["operators"] = said(lambda: method(operators=ClosedForm(damping=0.1 + rank)).fit())
    found["lengths"] = said(lambda: method(train=TensorDataset(*whole[: 20 + rank])).fit())
    found["weights"] = said(lambda: method(model=built(MLP, seed=7 + rank)).fit())
    found["inputs"] = said(lambda: reader.influence(tuple(t[: 3 + rank] for t in test.tensors)))
    inputs = whole.tensors[0].clone()
    inputs[30] = torch.nan  # in the share of rank 1, but seen in sums
    found["nan"] = said(method(train=TensorDataset(inputs, whole.tensors[1])).fit)
    tagger, tagged, asked = tokens()
    by_matrix = method(tagger, tagged, operators=ClosedForm(form="matrix"))
    found["positions of a matrix"] = said(lambda: by_matrix.positions_of(asked.tensors, 40))
    without = TensorDataset(tagged.tensors[0], torch.full_like(tagged.tensors[1], IGNORED))
    found["no label"] = said(method(tagger, without).fit)
    found["changed"] = said(lambda: method(tagger, tagged).fit().remove_examples([1]))
    labels = whole.tensors[1].clone()
    labels[30] = 99  # in the share of rank 1
    found["bad label"] = said(method(train=TensorDataset(whole.tensors[0], labels)).fit)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return start(2, one_after_the_other, folder, folder=folder)


@pytest.mark.slow
class TestTwoRanks:
    def test_each_reads_its_share(self, both):
        assert both[0]["read"] == (list(range(23)), (0, 23))
        assert both[1]["read"] == (list(range(23, 47)), (23, 47))

    def test_what_is_saved_is_loaded(self, both):
        assert both[0]["loaded"]
        assert both[1]["loaded"]
        for rank, found in both.items():
            assert f"other.rank{rank}-of-2'. Use as many, or fit again." in found["no file"]

    @pytest.mark.slow
    def test_queries_are_those_of_rank_0(self, both):
        model, train, test = data_and_model()
        wanted = STRIDE(model, train).influence(test.tensors)[0, :3]
        for found in both.values():
            assert found["queries are those of rank 0"] == pytest.approx(wanted.tolist(), abs=1e-5)

    @pytest.mark.parametrize(
        ("case", "message"),
        [
            (
                "few",
                "ValueError: `train_dataset` must hold an example for each of 2 ranks; got 1. Start fewer",
            ),
            ("stream", "TypeError: `train_dataset` must have a length in a process group; got Stream."),
            ("trained", "ValueError: `operators` must be others in a process group; got 'trained'."),
            ("gauss-newton", "ValueError: `curvature` must be another one in a process group; got 'gauss"),
            ("projection", "ValueError: `projection` must be None in a process group; got 'random'."),
            ("batch", "TypeError: `train_dataset` must be a Dataset or a DataLoader; got tuple."),
            ("operators", "ValueError: `operators` must be the same on every rank"),
            (
                "lengths",
                "ValueError: `operators` must be the same on every rank, as the layers and the length",
            ),
            (
                "weights",
                "ValueError: `model` must have the same weights on every rank; got something else than",
            ),
            ("inputs", "ValueError: `inputs` must be the same test points on every rank"),
            ("positions of a matrix", "ValueError: `form` must be 'rows' for scores of the positions of a"),
            ("no label", "ValueError: `train_dataset` must have at least one label that is not ignored; got"),
            ("changed", "ValueError: `train_dataset` must be changed in a single process; got a group of 2"),
            (
                "nan",
                "ValueError: `train_dataset` must give finite activations; got NaN or infinity in feature",
            ),
        ],
    )
    def test_all_refuse_in_the_same_words(self, both, case, message):
        assert both[0][case].startswith(message)
        assert both[1][case] == both[0][case]

    def test_an_exception_in_one_ends_the_call_in_all(self, both):
        assert both[1]["bad label"].startswith("ValueError: `train_dataset` must")
        assert both[0]["bad label"].startswith("RuntimeError: The collective ")
        assert "failed on rank 0 of 2: rank 1 stopped in fit: ValueError: `train_d" in both[0]["bad label"]


def test_outside_of_a_group():
    model, train, _ = data_and_model()
    with pytest.raises(
        ValueError, match=r"`process_group` must be initialized; got none\. Start with torchrun"
    ):
        DistributedSTRIDE(model, train)


# A rank that is lost.


class Deadly(nn.Module):
    """Its pass over a batch of training examples ends the process, or lasts for ever, on one rank."""

    def __init__(self, model, here, how, at=2):
        super().__init__()
        self.model, self.here, self.how, self.at, self.passes = model, here, how, at, 0

    def forward(self, x):
        self.passes += len(x) == 4  # smaller ones are probes
        if self.here and self.passes == self.at:
            os.kill(os.getpid(), signal.SIGKILL) if self.how == "dies" else time.sleep(100)
        return self.model(x)


def with_a_loss(rank, how, lost=1):
    model, train, test = data_and_model()
    method = DistributedSTRIDE(Deadly(model, rank == lost, how), train, batch_size=4)
    return said(lambda: method.influence(test.tensors)), said(lambda: method.influence(test.tensors))


class TestALostRank:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["file", "tcp"])
    def test_is_named_by_the_others(self, tmp_path, free_port, kind):
        method = f"tcp://127.0.0.1:{free_port}" if kind == "tcp" else None
        found = start(4, with_a_loss, "dies", folder=tmp_path, method=method, survivors=3)
        assert found.keys() == {0, 2, 3}
        for rank, (message, again) in found.items():
            assert message.startswith("RuntimeError: The collective "), message
            assert f"failed on rank {rank} of 4" in message
            assert "No answer from rank 1: dead, or still busy elsewhere." in message
            assert "start all processes again with the same command" in message
            assert again == message

    @pytest.mark.slow
    def test_that_keeps_the_store_is_known_by_its_silence(self, tmp_path, free_port):
        method = f"tcp://127.0.0.1:{free_port}"
        found = start(3, with_a_loss, "dies", 0, folder=tmp_path, method=method, survivors=2, timeout=20)
        assert found.keys() == {1, 2}
        for message, _ in found.values():
            assert message.startswith("RuntimeError: The collective ")
            assert (
                "The store of the group does not answer: its keeper, in general rank 0, is gone." in message
            )

    @pytest.mark.slow
    def test_that_hangs_is_named_within_the_timeout(self, tmp_path):
        found = start(2, with_a_loss, "hangs", folder=tmp_path, timeout=3, survivors=1)
        message, _ = found[0]
        assert "it took longer than the timeout of the process group" in message
        assert "No answer from rank 1" in message

    @pytest.mark.slow
    def test_starting_again_gives_the_scores_of_one_process(self, tmp_path):
        start(2, with_a_loss, "dies", folder=tmp_path, survivors=1, timeout=20)
        model, train, test = data_and_model()
        wanted = STRIDE(model, train, batch_size=4).influence(test.tensors)
        for scores in start(2, dense, folder=tmp_path).values():
            assert torch.allclose(torch.from_numpy(scores), wanted, atol=1e-5 * float(wanted.abs().max()))

    @pytest.mark.slow
    def test_with_a_store_finished_chunks_are_not_computed_again(self, tmp_path):
        start(2, with_a_store, str(tmp_path), "dies", folder=tmp_path, survivors=1, timeout=20)
        model, train, test = data_and_model()
        wanted = STRIDE(model, train).influence(test.tensors)
        again = start(2, with_a_store, str(tmp_path), "lives", folder=tmp_path)
        # Of 23 and 24 examples rank 0 had read all, and rank 1 the first chunk.
        assert again[0][1] == 0
        assert 0 < again[1][1] < 24
        for scores, _ in again.values():
            assert torch.allclose(torch.from_numpy(scores), wanted, atol=1e-5 * float(wanted.abs().max()))
        loaded = start(2, from_a_file, str(tmp_path), folder=tmp_path)
        for rank, scores in loaded.items():
            assert (scores == again[rank][0]).all()


class Counts(nn.Module):
    """Counts the training examples that it sees in whole batches of 4."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x):
        self.seen += len(x) if len(x) == 4 else 0
        return self.model(x)


def with_a_store(rank, folder, how):
    model, train, test = data_and_model()
    counts = Counts(Deadly(model, rank == 1 and how == "dies", "dies", at=4))
    store = FeatureStore(f"{folder}/store", chunk="1KiB")
    method = DistributedSTRIDE(counts, train, batch_size=4, feature_store=store)
    said_or_scores = said(method.fit)
    if said_or_scores != "nothing":
        return said_or_scores, counts.seen
    method.save(f"{folder}/method")
    seen = counts.seen
    return method.influence(test.tensors).numpy(), seen


def from_a_file(rank, folder):
    model, train, test = data_and_model()
    counts = Counts(Deadly(model, False, "dies"))
    method = DistributedSTRIDE.load(f"{folder}/method", counts, train)
    return method.influence(test.tensors).numpy()


def dense(rank):
    model, train, test = data_and_model()
    return DistributedSTRIDE(model, train, batch_size=4).influence(test.tensors).numpy()


# The command line under torchrun.

EXPLAIN = ["explain", "--preset", "smoke", "--index", "3", "--index", "17", "--store"]


def as_torchrun_starts_it(rank, size, port, out, arguments):
    torch.set_num_threads(1)
    known = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in known.items()}, TORCHELASTIC_RUN_ID="test")
    sys.argv = ["stride-captum", *arguments]
    sys.stdout = open(f"{out}-{rank}.txt", "w")  # noqa: SIM115
    sys.stderr = sys.stdout
    main()


def torchrun(size, port, out, *arguments):
    """What each rank prints, and their exit codes."""
    processes = [
        CONTEXT.Process(target=as_torchrun_starts_it, args=(rank, size, port, out, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(50)
        process.kill()
    said = [Path(f"{out}-{rank}.txt").read_text() for rank in range(size)]
    return said, [process.exitcode for process in processes]


@pytest.mark.slow
def test_explain_under_torchrun(tmp_path, free_port):
    alone = CliRunner().invoke(app, [*EXPLAIN, f"{tmp_path}/a", "--out", f"{tmp_path}/one", "--quiet"])
    assert alone.exit_code == 0, alone.output
    arguments = [*EXPLAIN, f"{tmp_path}/b", "--out", f"{tmp_path}/two"]
    said, codes = torchrun(2, free_port, tmp_path / "said", *arguments)
    assert codes == [0, 0], said
    assert "report.html" in said[0].replace("\n", "")
    assert said[1] == ""
    one, two = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert [found["environment"].pop("torch_threads") for found in (one, two)] == [torch.get_num_threads(), 1]
    same = one.keys() - {"command", "seconds", "points", "suspects"}
    assert {key: one[key] for key in same} == {key: two[key] for key in same}
    for point, other in zip(one["points"], two["points"], strict=True):
        for side in ("proponents", "opponents"):
            equal_neighbors(point.pop(side), other.pop(side))
        assert point.pop("reliability") is not None
        assert other.pop("reliability") is None  # which needs the whole training set in one process
        assert point == other
    equal_neighbors(one["suspects"], two["suspects"])
    assert (tmp_path / "two" / "report.html").exists()


def equal_neighbors(found, wanted):
    assert [n["index"] for n in found] == [n["index"] for n in wanted]
    assert [n["score"] for n in found] == pytest.approx([n["score"] for n in wanted], rel=1e-4)


@pytest.mark.slow
def test_other_commands_are_refused_under_torchrun(tmp_path, free_port):
    said, codes = torchrun(2, free_port, tmp_path / "said", "compare")
    assert codes == [1, 1]
    assert said[0].startswith("Only `explain` runs under torchrun. Retrainings use --jobs")
    assert said[1] == ""


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
