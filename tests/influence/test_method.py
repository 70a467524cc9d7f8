"""Arguments that every method has: aggregate, vectors, ids, defaults, and what `repr` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from planted import MLP, N_TEST, N_TRAIN, loader, trained
from torch import nn
from torch.utils.data import Subset, TensorDataset

from stride_captum import STRIDE, ClosedForm, Trained, adapters
from stride_captum.conformance.shipped import shipped
from stride_captum.influence.rows import result_rows
from stride_captum.losses import CrossEntropy

SUBJECTS = {subject.name: subject.build for subject in shipped()}
WITH_VECTORS = ["STRIDE", "Similarity", "DiagonalEKFAC", "TRAK"]


class TestAggregate:
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_it_is_the_sum_over_all_test_points_whatever_their_batches(self, planted, name):
        model, train, test = planted
        method = SUBJECTS[name](model, train)
        scores = method.influence(test)
        whole = method.influence(loader(test, 2), aggregate=True)
        assert whole.shape == (1, N_TRAIN)
        scale = float(scores.abs().max())
        torch.testing.assert_close(whole[0], scores.sum(0), rtol=0, atol=1e-5 * scale)

    @pytest.mark.parametrize("proponents", [True, False])
    def test_the_k_best_are_those_of_the_sum(self, planted, proponents):
        model, train, test = planted
        method = STRIDE(model, train, memory_budget=2_000)  # several blocks of columns
        whole = method.influence(test, aggregate=True)[0]
        top = method.influence(loader(test, 3), 5, proponents, False, True)
        best = whole.sort(descending=proponents, stable=True)
        assert top.indices.shape == (1, 5)
        assert torch.equal(top.indices[0], best.indices[:5])
        torch.testing.assert_close(top.influence_scores[0], best.values[:5])

    def test_it_adds_up_cosines_and_other_responses(self, planted):
        model, train, test = planted
        method = STRIDE(model, train)
        for question in ({"normalize": "cosine"}, {"response": "logit", "target": 1}):
            found = method.influence(test, aggregate=True, **question)
            torch.testing.assert_close(found[0], method.influence(test, **question).sum(0))


class TestVectors:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", WITH_VECTORS)
    @pytest.mark.parametrize("checkpoints", [False, True])
    def test_their_products_are_the_scores(self, planted, name, checkpoints):
        model, train, test = planted
        options = {"checkpoints": [model.state_dict(), trained(MLP, seed=3)[0].state_dict()]}
        method = SUBJECTS[name](model, train, **(options if checkpoints else {}))
        for question in ({}, {"response": "logit", "target": "predicted"}):
            left = method.compute_intermediate_quantities(loader(test, 2), **question)
            right = method.compute_intermediate_quantities(range(N_TRAIN), side="train")
            scores = method.influence(test, **question)
            scale = float(scores.abs().max())
            torch.testing.assert_close(left @ right.T, scores, rtol=0, atol=1e-4 * scale)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", WITH_VECTORS)
    def test_rows_come_in_the_order_of_the_indices(self, planted, name):
        method = SUBJECTS[name](*planted[:2])
        every = method.compute_intermediate_quantities(range(N_TRAIN), side="train")
        few = method.compute_intermediate_quantities([7, 0, 41], side="train")
        torch.testing.assert_close(few, every[[7, 0, 41]])
        for kind in (torch.tensor([7, 0, 41]), np.array([7, 0, 41], dtype=np.uint8), (7, 0, 41)):
            assert method.compute_intermediate_quantities(kind, side="train").equal(few)
        back = method.compute_intermediate_quantities(slice(None, None, -1), side="train")
        assert back.equal(every.flip(0))
        bools = [i in (7, 0, 41) for i in range(N_TRAIN)]
        assert method.compute_intermediate_quantities(bools, side="train").equal(few[[1, 0, 2]])
        mask = torch.zeros(N_TRAIN, dtype=torch.bool)
        mask[[7, 0, 41]] = True
        found = method.compute_intermediate_quantities(mask, side="train")
        torch.testing.assert_close(found, every[[0, 7, 41]])

    @pytest.mark.parametrize("side", ["test", "train"])
    def test_aggregate(self, planted, side):
        method = STRIDE(*planted[:2], operators=ClosedForm(curvature="eigenvalue-corrected"))
        inputs = range(5) if side == "train" else loader(planted[2], 2)
        whole = method.compute_intermediate_quantities(inputs, True, side=side)
        parts = method.compute_intermediate_quantities(inputs, side=side)
        torch.testing.assert_close(whole, parts.sum(0, keepdim=True))

    def test_the_width_is_that_of_features_and_classes(self, planted):
        method = STRIDE(*planted[:2])
        left = method.compute_intermediate_quantities(planted[2])
        assert left.shape == (N_TEST, (method.n_features_ + 1) * 3)

    @pytest.mark.parametrize(
        "build",
        [
            lambda model, train: STRIDE(model, train, operators=ClosedForm(threshold=0.01)),
            lambda model, train: STRIDE(model, train, operators=Trained(iterations=1, rank=2)),
            adapters.KNNShapley,
            adapters.ClassSimilarity,
            adapters.Random,
            adapters.TracIn,
        ],
    )
    @pytest.mark.parametrize("side", ["test", "train"])
    def test_methods_without_vectors_say_so(self, planted, build, side):
        method = build(*planted[:2])
        if isinstance(method, adapters.TracIn) and side == "train":
            pytest.skip("its training side has gradients")
        inputs = [0] if side == "train" else planted[2]
        with pytest.raises(ValueError, match=r"scores are products of vectors; those of \w+ are not"):
            method.compute_intermediate_quantities(inputs, side=side)

    def test_wrong_arguments(self, planted):
        method = STRIDE(*planted[:2], memory_budget=100)
        with pytest.raises(ValueError, match="`side` must be one of 'test', 'train'"):
            method.compute_intermediate_quantities(planted[2], side="training")
        with pytest.raises(ValueError, match="`memory_budget` must hold a vector of 60 numbers"):
            method.compute_intermediate_quantities(planted[2])
        with pytest.raises(ValueError, match="`inputs` must"):
            method.compute_intermediate_quantities([N_TRAIN], side="train")

    def test_a_default_normalization_is_refused(self, planted):
        method = STRIDE(*planted[:2], normalize="cosine")
        for side, inputs in (("test", planted[2]), ("train", [0])):
            with pytest.raises(ValueError, match="`normalize` must be None in the constructor for compute_"):
                method.compute_intermediate_quantities(inputs, side=side)


class TestIds:
    NAMES: ClassVar[list[str]] = [f"image-{i}.png" for i in range(N_TRAIN)]

    def test_rows_have_ids_labels_and_scores(self, planted):
        model, train, test = planted
        method = STRIDE(model, train, ids=self.NAMES)
        top = method.influence(test, 3)
        rows = result_rows(method, top, as_frame=False)
        assert len(rows) == 3 * N_TEST
        place = int(top.indices[1, 2])
        wanted = {"test": 1, "rank": 3, "train": place, "id": f"image-{place}.png"}
        wanted |= {"label": int(train.tensors[1][place]), "score": float(top.influence_scores[1, 2])}
        assert rows[5] == wanted

    def test_a_data_frame_if_pandas_is_installed(self, planted):
        pandas = pytest.importorskip("pandas")
        method = STRIDE(*planted[:2])
        frame = result_rows(method, method.influence(planted[2], 2))
        assert isinstance(frame, pandas.DataFrame)
        assert list(frame.columns) == ["test", "rank", "train", "label", "score"]

    def test_the_data_set_may_have_them(self, planted):
        class Named(TensorDataset):
            ids = np.arange(N_TRAIN) + 1000

        method = STRIDE(planted[0], Named(*planted[1].tensors))
        rows = result_rows(method, method.influence(planted[2], 1), as_frame=False)
        assert all(row["id"] == row["train"] + 1000 for row in rows)

    def test_a_subset_has_those_of_its_examples(self, planted):
        class Named(TensorDataset):
            ids: ClassVar = [f"image-{i}.png" for i in range(N_TRAIN)]

        order = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(0)).tolist()
        method = STRIDE(planted[0], Subset(Subset(Named(*planted[1].tensors), order), range(5, N_TRAIN)))
        rows = result_rows(method, method.influence(planted[2], 2), as_frame=False)
        assert all(row["id"] == f"image-{order[row['train'] + 5]}.png" for row in rows)

    def test_a_series_is_read_by_place(self, planted):
        pandas = pytest.importorskip("pandas")
        names = pandas.Series(self.NAMES, index=range(N_TRAIN - 1, -1, -1))
        method = STRIDE(*planted[:2], ids=names)
        rows = result_rows(method, method.influence(planted[2], 2), as_frame=False)
        assert all(row["id"] == self.NAMES[row["train"]] for row in rows)

    @pytest.mark.parametrize("whole", [True, False])
    def test_labels_are_shown_where_they_are_sure_to_be_those(self, planted, whole):
        class Chosen(torch.utils.data.Dataset):
            def __init__(self, x, labels, places):
                self.x, self.labels, self.places = x, labels, places

            def __len__(self):
                return len(self.x)

            def __getitem__(self, i):
                return self.x[self.places[i]], self.labels[self.places[i]]

        x, y = planted[1].tensors
        places = list(range(N_TRAIN)) if whole else [*range(1, N_TRAIN), 0]
        method = STRIDE(planted[0], Chosen(x, y.tolist(), places))
        rows = result_rows(method, method.influence(planted[2], 3), as_frame=False)
        assert all(row.get("label") == (int(y[row["train"]]) if whole else None) for row in rows)

    def test_labels_that_are_no_classes_are_shown_as_they_are(self):
        x, y = torch.randn(20, 3), torch.randn(20)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        method = STRIDE(model, TensorDataset(x, y), layers=["1"], loss="mse")
        rows = result_rows(method, method.influence((x[:2], y[:2]), 3), as_frame=False)
        assert all(row["label"] == pytest.approx(float(y[row["train"]])) for row in rows)

    def test_wrong_ones(self, planted):
        with pytest.raises(ValueError, match="`ids` must hold one for each of 48 training examples; got 3"):
            STRIDE(*planted[:2], ids=["a", "b", "c"])
        with pytest.raises(TypeError, match="`ids` must be a sequence with a name for each"):
            adapters.Similarity(*planted[:2], ids="abc")
        with pytest.raises(TypeError, match=r"`result` must be what influence\(inputs, k\) has returned"):
            result_rows(STRIDE(*planted[:2]), torch.zeros(2, 3))


class TestReplacedAfterTheFit:
    @pytest.mark.parametrize("name", ["STRIDE", "TracIn", "DiagonalEKFAC", "Similarity"])
    def test_another_training_set(self, planted, name):
        model, train, test = planted
        method = SUBJECTS[name](model, train).fit()
        method.train_dataset = TensorDataset(*train[:30])
        with pytest.raises(TypeError, match="`train_dataset` must be the data set that the method was fit"):
            method.influence(test)
        wanted = SUBJECTS[name](model, TensorDataset(*train[:30])).influence(test)
        assert method.fit().influence(test).equal(wanted)

    @pytest.mark.parametrize("name", ["STRIDE", "TracIn", "DiagonalEKFAC"])
    def test_another_loss(self, planted, name):
        model, train, test = planted
        method = SUBJECTS[name](model, train).fit()
        method.loss = CrossEntropy(label_smoothing=0.5)
        with pytest.raises(ValueError, match="`loss` must be 'cross_entropy' as it was when the method was"):
            method.influence(test)


class TestDefaults:
    @pytest.mark.parametrize("name", ["STRIDE", "DiagonalEKFAC", "TRAK"])
    def test_a_call_replaces_those_of_the_constructor_none_included(self, planted, name):
        model, train, test = planted
        build = SUBJECTS[name]
        plain, cosine = build(model, train), build(model, train, normalize="cosine")
        assert torch.equal(cosine.influence(test), plain.influence(test, normalize="cosine"))
        assert torch.equal(cosine.influence(test, normalize=None), plain.influence(test))
        groups = [[0, 1], [5]]  # effects are sums of plain scores in any case
        assert torch.equal(cosine.subset_influence(test, groups), plain.subset_influence(test, groups))

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_repr_names_the_class_and_whether_it_is_fitted(self, planted, name):
        method = SUBJECTS[name](*planted[:2])
        assert repr(method).startswith(type(method).__name__ + "(")
        assert "not fitted" in repr(method)
        method.fit()
        assert f"n_train={N_TRAIN}" in repr(method)

    def test_repr_says_the_options(self, planted):
        assert "damping=" in repr(adapters.DiagonalEKFAC(*planted[:2]))
        assert "seed=7" in repr(adapters.Random(*planted[:2], seed=7))


class TestMemoryOfMethodsThatComputeAllColumns:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["trained", "TracIn", "EKFAC", "KNNShapley"])
    def test_a_small_budget_makes_small_batches_of_test_points(self, planted, name, monkeypatch):
        if name == "EKFAC":
            pytest.importorskip("kronfluence")
        model, train, test = planted
        sizes = []

        def build(budget):
            if name == "trained":
                made = STRIDE(model, train, operators=Trained(iterations=1, rank=2), memory_budget=budget)
            else:
                made = SUBJECTS[name](model, train, memory_budget=budget)
            prepare = made.prepare_query

            def counted(state, model, batch, query):
                sizes.append(len(batch))
                return prepare(state, model, batch, query)

            monkeypatch.setattr(made, "prepare_query", counted)
            return made

        small = build(2 * 2 * 4 * N_TRAIN)  # the scores of two test points, twice
        monkeypatch.setattr(type(small), "max_rows", lambda method: None)  # gradients are another matter
        scores = small.influence(test)
        assert max(sizes) == 2
        wanted = build("1GiB").influence(test)
        assert max(sizes) == N_TEST
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


TYPED = """
import torch
from captum.influence._core.tracincp import KMostInfluentialResults
from stride_captum import STRIDE

def scores(method: STRIDE, x: torch.Tensor) -> torch.Tensor:
    return method.influence(x)

def best(method: STRIDE, x: torch.Tensor) -> KMostInfluentialResults:
    return method.influence(x, k=5)

def also(method: STRIDE, x: torch.Tensor) -> torch.Tensor:
    return method.influence(x, normalize=None, response="logit", aggregate=True)

method: STRIDE
reveal_type(method.fit())
"""


@pytest.mark.slow
def test_types_tell_scores_from_the_k_best(tmp_path):
    file = tmp_path / "typed.py"
    file.write_text(TYPED)
    root = Path(__file__).parents[2]
    options = ["--no-incremental", "--follow-imports=silent", "--ignore-missing-imports", "--strict"]
    command = [sys.executable, "-m", "mypy", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(root))
    assert 'Revealed type is "stride_captum.stride.STRIDE"' in done.stdout
    assert done.returncode == 0, done.stdout
    wrong = TYPED.replace("return method.influence(x)", "return method.influence(x, 5)")
    file.write_text(wrong)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(root))
    # Captum has no types: what it returns is Any, where a Tensor is promised.
    assert "typed.py:7: error: Returning Any from function declared to return" in done.stdout


def _environment(root):
    import os

    return {**os.environ, "MYPYPATH": str(root)}


@pytest.mark.parametrize("cls", [STRIDE, adapters.TracIn, adapters.Random])
def test_the_positional_call_of_captum_is_answered_with_ours(planted, cls):
    model, train, _ = planted
    message = (
        rf"`arguments` must be {cls.__name__}\(model, train_dataset, ...\) with all others by name; got T"
    )
    with pytest.raises(TypeError, match=message + r".*Write \w+\(model, train_dataset, checkpoints=\[...\]"):
        cls(model, model.fc3, train, [model.state_dict()])
