"""Tasks beyond one class an example: their data, their training, and a comparison of methods on each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.evaluation import compare, load_task
from stride_captum.evaluation.comparison.explain import explain
from stride_captum.evaluation.comparison.in_words import label_in_words, output_in_words
from stride_captum.evaluation.comparison.plan import settle
from stride_captum.evaluation.report.html import write_explanation
from stride_captum.evaluation.report.terminal import show_explanation
from stride_captum.evaluation.retraining import store
from stride_captum.evaluation.retraining.store import Fingerprints
from stride_captum.evaluation.retraining.task_parts import cross_fit
from stride_captum.evaluation.retraining.training import logits_of, mean_residual, train_model
from stride_captum.evaluation.tasks.built_in import WITHOUT_CLASSES
from stride_captum.evaluation.tasks.bundled_data import IGNORED, TAGS, digit_pairs, source_lines
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task
from stride_captum.evaluation.tasks.task_loss import (
    loss_of_methods,
    objective,
    response_in_words,
    response_of,
    responses,
)
from stride_captum.losses import MSE, BinaryCrossEntropy, CrossEntropy
from stride_captum.losses.summed_positions import SummedPositions

SHORT = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(name, preset="smoke", training=SHORT) for name in WITHOUT_CLASSES}


@pytest.mark.parametrize("name", WITHOUT_CLASSES)
class TestEach:
    @pytest.mark.slow
    def test_data_and_network_go_together(self, tasks, name):
        task = tasks[name]
        outputs = logits_of(task.build_model(), task.train.tensors[0][:3], loss=task.loss)
        labels = task.loss.labels(task.train.tensors[1][:3], outputs.shape[1], "labels")
        assert torch.isfinite(task.loss.values(outputs, labels)).all()
        assert not task.has_classes
        again = load_task(name, preset="smoke")
        for one, other in zip(task.train.tensors, again.train.tensors, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.slow
    def test_training_lowers_the_loss(self, tasks, name):
        task = tasks[name]
        x, y = task.train.tensors

        def loss_of(model):
            rows = logits_of(model, x, loss=task.loss)
            return float(objective(task.loss, rows, y))

        fresh = task.build_model()
        trained = train_model(task.build_model, x, y, replace(SHORT, epochs=4), 0, loss=task.loss)
        assert loss_of(trained) < loss_of(fresh)

    @pytest.mark.slow
    def test_methods_are_compared(self, tasks, name, tmp_path):
        methods = ["STRIDE", "STRIDE, checkpoints", "TracIn", "Random"]
        sizes = {"n_subsets": 4, "n_seeds": 1, "n_models": 1, "n_test": 12, "n_jobs": 1, "n_resamples": 0}
        task = load_task(name, preset="smoke", training=SHORT)
        result = compare(methods, task, store=tmp_path, measures=["lds"], **sizes)
        assert [row.name for row in result.rows] == methods
        assert result.protocol["response"] == response_in_words(task.loss)
        assert all(row.lds.per_model for row in result.rows)

    @pytest.mark.slow
    def test_what_has_no_classes_is_left_out_or_refused(self, tasks, name, tmp_path):
        question = settle(None, tasks[name], store=tmp_path, n_subsets=4, n_test=12)
        assert {"ClassRandom", "ClassSimilarity", "KNNShapley"} <= set(question.skipped)
        why = question.skipped["STRIDE trained + Lasso"]
        assert ("takes minutes for several positions" in why) is (name in ("tagging", "segmentation"))
        compared = {spec.name for spec in question.specs}
        assert {"STRIDE", "TRAK", "TracIn", "TracIn, out-of-sample residuals", "Random"} <= compared
        with pytest.raises(ValueError, match="for ClassRandom, whose scores compare classes"):
            settle(["ClassRandom"], tasks[name], store=tmp_path, n_subsets=4, n_test=12)
        with pytest.raises(ValueError, match="`measures` must be read off retrained halves, or leakage"):
            settle(["STRIDE"], tasks[name], store=tmp_path, measures=["mislabel"], n_subsets=4, n_test=12)

    @pytest.mark.slow
    def test_leaked_examples_are_found(self, tasks, name, tmp_path):
        options = {"leakage": {"counts": (3,), "kinds": ("exact",)}}
        sizes = {"n_models": 1, "n_test": 12, "n_jobs": 1, "n_resamples": 0}
        result = compare(["STRIDE", "Random"], tasks[name], store=tmp_path, measures=options, **sizes)
        ranks = {(row.name, row.normalize): row.result.mean_rank for row in result.leakage}
        assert ranks["STRIDE", "cosine"] < ranks["Random", None]

    @pytest.mark.slow
    def test_test_points_are_explained(self, tasks, name, tmp_path):
        task = tasks[name]
        model = train_model(task.build_model, *task.train.tensors, SHORT, 0, loss=task.loss)
        found, _ = explain(task, model=model, k=3, n_suspects=5)
        x, y = task.test.tensors
        rows = logits_of(model, x, loss=task.loss)
        values = task.loss.values(rows, task.loss.labels(y, rows.shape[1], "labels"))
        hardest = [point.index for point in found.points[:3]]
        assert values[hardest].tolist() == values.topk(3).values.tolist()
        method = STRIDE(model, task.train, loss=loss_of_methods(task.loss))
        few = [point.index for point in found.points]
        scores = method.influence((x[few], y[few]))
        for point, row in zip(found.points, scores, strict=True):
            best, worst = row.topk(3), row.topk(3, largest=False)
            assert [n.index for n in point.proponents] == best.indices.tolist()
            assert [n.score for n in point.opponents] == pytest.approx(worst.values.tolist(), rel=1e-4)
            assert point.probability is None
            value = response_of(task.loss, rows[[point.index]], y[[point.index]])
            assert point.response == pytest.approx(float(value), rel=1e-5)
        flags = method.mislabel_scores()
        assert [n.index for n in found.suspects] == flags.topk(5).indices.tolist()
        assert found.accuracy == {}
        assert found.mean_loss["test"] == pytest.approx(float(objective(task.loss, rows, y)))
        page = write_explanation(
            found.to_dict(), task.train.tensors[0], x, tmp_path / "report.html"
        ).read_text()
        assert f"<b>{found.mean_loss['train']:.3g}</b> mean training loss" in page
        assert "p(label)" not in page
        show_explanation(found)

    @pytest.mark.slow
    def test_models_of_halves_are_explained_with_their_mean_prediction(self, tasks, name):
        task = tasks[name]
        found, method = explain(task, indices=[1], k=2, n_suspects=2, retrainings=1)
        models = cross_fit(task, 0, 1, None)
        rows = []
        for checkpoint in models.checkpoints:
            model = task.build_model()
            model.load_state_dict(checkpoint.weights)
            rows.append(logits_of(model.eval(), task.test.tensors[0][1:2], loss=task.loss))
        label = task.test.tensors[1][1]
        assert found.points[0].predicted == output_in_words(task.loss, torch.stack(rows).mean(0)[0], label)
        assert len(method.checkpoints) == 2

    def test_data_of_another_kind_are_refused(self, tasks, name):
        with pytest.raises(ValueError, match="`data` must be left out for the task"):
            load_task(name, data="module:factory")


class TestData:
    def test_labels_of_pairs_are_the_digits_there(self):
        train, test = digit_pairs(50, 20)
        counts = train.tensors[1].sum(1)
        assert set(counts.tolist()) <= {1.0, 2.0}
        assert train.tensors[0].shape == (50, 1, 8, 16)
        halves = {image.numpy().tobytes() for x in train.tensors[0] for image in (x[0, :, :8], x[0, :, 8:])}
        others = {image.numpy().tobytes() for x in test.tensors[0] for image in (x[0, :, :8], x[0, :, 8:])}
        assert not halves & others

    def test_tags_are_those_of_python(self):
        train, test = source_lines(400, 50)
        assert len(train) == 400
        assert len(test) == 50
        x, y = train.tensors
        for line, tags in zip(x, y, strict=True):
            text = "".join(chr(int(c) + 31) if c else " " for c in line)
            if text.lstrip().startswith("#"):
                assert set(tags[tags != IGNORED].tolist()) == {TAGS.index("comment")}
            if text.lstrip().startswith("return "):
                start = text.index("return")
                word = set(tags[start : start + 6].tolist())
                assert word in ({TAGS.index("keyword")}, {TAGS.index("string")})  # the last in a docstring
            assert (tags[line == 1] != TAGS.index("name")).all()  # a space is no name

    def test_strokes_of_a_canvas_have_its_digit(self, tasks):
        x, y = tasks["segmentation"].train.tensors
        counted = y != IGNORED
        assert (counted.flatten(1).sum(1) > 0).all()
        assert (x[:, 0][counted] > 0.3).all()
        assert all(len(set(row[row != IGNORED].tolist())) == 1 for row in y)


class TestTheLossOfATask:
    def test_objectives_are_those_of_torch(self):
        z, y = torch.randn(5, 3), torch.rand(5, 3).round()
        torch.testing.assert_close(
            objective(MSE(), z, y), F.mse_loss(z, y, reduction="none").sum(1).mean() / 2
        )
        wanted = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1).mean()
        torch.testing.assert_close(objective(BinaryCrossEntropy(), z, y), wanted)
        classes = torch.tensor([0, 1, 2, 1, 0])
        assert torch.equal(objective(None, z, classes), F.cross_entropy(z, classes))
        together = SummedPositions(position=CrossEntropy(), n_positions=4, n_outputs=3)
        z, y = torch.randn(5, 4, 3), torch.randint(3, (5, 4))
        y[0, 1:] = IGNORED
        wanted = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum", ignore_index=IGNORED) / 20
        torch.testing.assert_close(objective(together, together.logits(z), y), wanted)

    def test_responses_are_the_first_of_the_loss(self):
        z, y = torch.randn(2, 3, 5, 4).double(), torch.rand(5, 4).round().double()
        found = responses(BinaryCrossEntropy(), z, y)
        torch.testing.assert_close(torch.from_numpy(found), ((2 * y - 1) * z).sum(-1))
        assert responses(MSE(), z, y).shape == (2, 3, 5)

    def test_a_run_with_another_loss_has_another_name(self):
        x, y = torch.randn(20, 10), torch.rand(20, 1).round()
        data = TensorDataset(x, y)
        build = load_task("diabetes", preset="smoke").build_model
        names = {
            Fingerprints(Task("t", data, data, build, SHORT, loss=loss)).of(0, None, "")
            for loss in (MSE(), BinaryCrossEntropy())
        }
        assert len(names) == 2

    def test_the_mean_residual_is_that_of_the_loss(self):
        task = load_task("diabetes", preset="smoke")
        model = task.build_model()
        x, y = task.train.tensors
        with torch.no_grad():
            wanted = (y - model(x)).abs().mean()
        assert mean_residual(model, x, y, task.loss) == pytest.approx(float(wanted), rel=1e-5)


class TestClassWeights:
    """A network is trained with them, as torch does: a mean over the weights of the labels."""

    def test_of_rows_the_objective_is_that_of_torch(self):
        rows, y = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 0, 1, 2])
        weight = torch.tensor([0.2, 1.0, 5.0])
        for smoothing in (0.0, 0.1):
            found = objective(CrossEntropy(weight=weight, label_smoothing=smoothing), rows, y)
            if not smoothing:
                torch.testing.assert_close(found, F.cross_entropy(rows, y, weight))
            assert not torch.isclose(found, objective(CrossEntropy(label_smoothing=smoothing), rows, y))
        assert objective(CrossEntropy(weight=torch.tensor([0.0, 1.0, 1.0])), rows[:1], y[:1]) == 0

    def test_of_positions_those_without_a_label_do_not_count(self):
        rows, y = torch.randn(2, 12), torch.tensor([[0, 1, 2, -100], [-100, 2, 2, 0]])
        weight = torch.tensor([0.2, 1.0, 5.0])
        loss = SummedPositions(position=CrossEntropy(weight=weight), n_positions=4, n_outputs=3)
        mean = F.cross_entropy(rows.reshape(8, 3), y.flatten(), weight)
        torch.testing.assert_close(objective(loss, rows, y), mean * 6 / 8)

    def test_a_network_is_trained_with_them(self):
        x, y = torch.randn(20, 3), torch.arange(20) % 3
        weight = torch.tensor([9.0, 1.0, 0.5])
        settings = TrainingSettings(optimizer="sgd", learning_rate=0.1, epochs=3, batch_size=20)
        found = train_model(linear, x, y, settings, 4, loss=CrossEntropy(weight=weight))
        torch.manual_seed(4)
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=settings.momentum)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, weight).backward()
            optimizer.step()
        torch.testing.assert_close(found.weight, model.weight)

    def test_they_are_part_of_the_name_in_the_store(self, monkeypatch):
        data = TensorDataset(torch.randn(6, 3), torch.arange(6) % 3)
        names = {}
        for recipe in (1, 2):
            monkeypatch.setattr(store, "_WEIGHTED_RECIPE", recipe)
            for weight in (None, [1.0, 2.0, 3.0]):
                task = Task("t", data, data, linear, SHORT, loss=CrossEntropy(weight=weight))
                names[recipe, weight is None] = Fingerprints(task).of(0, None, "")
        assert names[1, True] == names[2, True]
        assert len(set(names.values())) == 3


def linear():
    return nn.Linear(3, 3)


class TestInWords:
    """Labels and predictions of one example, as reports show them."""

    @pytest.mark.parametrize(
        ("loss", "label", "output", "words"),
        [
            (CrossEntropy(), torch.tensor(2), [0.0, 3.0, 1.0], (2, 1)),
            (CrossEntropy(), torch.tensor([0.1, 0.7, 0.2]), [4.0, 3.0, 1.0], (1, 0)),
            (MSE(), torch.tensor(1.5), [-0.25], ("1.5", "-0.25")),
            (MSE(), torch.arange(6.0), [9.0, 8, 7, 6, 5, 4], ("0 1 2 3 … of 6", "9 8 7 6 … of 6")),
            (MSE(), torch.tensor([0.0, 1.0]), [0.2, 0.7], ("0 1", "0.2 0.7")),
            (BinaryCrossEntropy(), torch.tensor([1.0, 0, 1]), [-1.0, 0.5, 2.0], ("0, 2", "1, 2")),
            (BinaryCrossEntropy(), torch.tensor([0.0, 0, 0]), [-1.0, -0.5, -2.0], ("none", "none")),
            (
                SummedPositions(position=CrossEntropy(), n_positions=4, n_outputs=2),
                torch.tensor([1, 1, -100, 0]),
                [0.0, 1, 1, 0, 0, 1, 2, 0],
                ("1x2 0", "1 0x2 (2 of 3 right)"),
            ),
            (
                SummedPositions(position=CrossEntropy(), n_positions=8, n_outputs=2),
                torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]),
                [1.0, 0] * 8,
                ("0 1 0 1 0 1 … of 8", "0x8 (4 of 8 right)"),
            ),
            (
                SummedPositions(position=MSE(), n_positions=3, n_outputs=1),
                torch.tensor([1.0, 2.0, 3.0]),
                [0.5, 0.25, 0.125],
                ("1 2 3", "0.5 0.25 0.125"),
            ),
        ],
    )
    def test_label_and_prediction(self, loss, label, output, words):
        row = torch.tensor(output)
        assert (label_in_words(loss, label, len(row)), output_in_words(loss, row, label)) == words
