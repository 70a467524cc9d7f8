"""Several checkpoints: each has the temperature that fits it, and examples that it may not have seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from planted import MLP, N_TRAIN, built, trained
from safetensors.torch import save_file
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from stride_captum import STRIDE, Batch, Checkpoint, ClosedForm, along_training
from stride_captum.adapters import DiagonalEKFAC
from stride_captum.evaluation import load_task
from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.comparison.shared.methods import METHODS, find_method
from stride_captum.evaluation.retraining.attributed_models import even_epochs, log_epochs
from stride_captum.influence.checkpoints.checkpoint import log_positions
from stride_captum.influence.checkpoints.weight_files import files_like
from stride_captum.losses import CrossEntropy
from stride_captum.residuals import mean_residual


def logits_of(weights, x):
    model = built(MLP)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(x)


def sharper(weights, factor):
    """A network whose logits are larger, as after more training."""
    scaled = {name: value.clone() for name, value in weights.items()}
    for name in ("fc3.weight", "fc3.bias"):
        scaled[name] *= factor
    return scaled


def temperatures(method):
    return [state.operators.temperature for state in method.fit()._states]


@pytest.fixture
def stages(planted):
    """An untrained network, one that is unsure, and one that is sure of everything it has learned."""
    weights = planted[0].state_dict()
    return [built(MLP, seed=9).state_dict(), sharper(weights, 2.5), sharper(weights, 50.0)]


class TestOneForEachCheckpoint:
    def test_it_raises_the_mean_residual_to_a_tenth_but_is_at_most_2(self, planted, stages):
        model, train, _ = planted
        x, y = train.tensors
        method = STRIDE(model, train, checkpoints=stages)
        first, middle, last = temperatures(method)
        assert first == 1  # its residuals are large as they are
        assert last == 2
        logits = [logits_of(weights, x) for weights in stages]
        assert mean_residual(logits[0], y) > 0.1
        assert 1 < middle < 2
        assert mean_residual(logits[1], y, middle) == pytest.approx(0.1, rel=1e-3)
        assert mean_residual(logits[2], y, 2.0) < 0.1

    def test_a_given_one_and_held_out_data_come_first(self, planted, stages):
        model, train, test = planted
        given = STRIDE(model, train, checkpoints=stages, operators=ClosedForm(temperature=3.0))
        assert temperatures(given) == [3.0] * 3
        matched = STRIDE(model, train, checkpoints=stages, held_out=test)
        for found, weights in zip(temperatures(matched), stages, strict=True):
            alone = built(MLP)
            alone.load_state_dict(weights)
            assert temperatures(STRIDE(alone, train, held_out=test)) == [found]

    def test_one_checkpoint_has_what_the_model_has(self, planted, stages):
        model, train, test = planted
        own = [model.state_dict()]
        assert torch.equal(
            STRIDE(model, train, checkpoints=own).influence(test), STRIDE(model, train).influence(test)
        )
        assert temperatures(STRIDE(model, train, checkpoints=own)) == [2.0]

    def test_several_leave_the_ridge_head_out(self, planted, stages):
        model, train, test = planted
        found = STRIDE(model, train, checkpoints=stages)
        options = ClosedForm(residuals="temperature")
        wanted = STRIDE(model, train, checkpoints=stages, operators=options)
        assert torch.equal(found.influence(test), wanted.influence(test))
        other = STRIDE(model, train, checkpoints=stages, operators=ClosedForm(residuals="both"))
        assert not torch.equal(found.influence(test), other.influence(test))

    def test_gradient_methods_take_the_same(self, planted, stages):
        method = DiagonalEKFAC(*planted[:2], checkpoints=stages, residuals="temperature").fit()
        found = [state.temperature for state in method._states]
        assert found == temperatures(STRIDE(*planted[:2], checkpoints=stages))


class TestExamplesThatACheckpointHasNotSeen:
    def test_the_temperature_is_matched_to_them(self, planted):
        model, train, _ = planted
        x, y = train.tensors
        seen = list(range(0, N_TRAIN, 2))
        unseen = list(range(1, N_TRAIN, 2))
        half, *_ = trained(MLP, seed=4)
        weights = sharper(half.state_dict(), 5.0)
        method = STRIDE(model, train, checkpoints=[Checkpoint(weights, seen=seen)])
        (found,) = temperatures(method)
        z = logits_of(weights, x)
        target = mean_residual(z[unseen], y[unseen])
        assert found > 1
        assert mean_residual(z[seen], y[seen], found) == pytest.approx(target, rel=1e-3)

    def test_it_counts_for_all_examples(self, planted):
        model, train, test = planted
        weights = sharper(model.state_dict(), 5.0)
        pair = [Checkpoint(weights, seen=range(24)), Checkpoint(weights, seen=range(24, 48))]
        method = STRIDE(model, train, checkpoints=pair)
        found = temperatures(method)
        alone = [
            STRIDE(
                model,
                train,
                checkpoints=[weights],
                operators=ClosedForm(residuals="temperature", temperature=t),
            )
            for t in found
        ]
        wanted = sum(one.influence(test) for one in alone) / 2
        torch.testing.assert_close(method.influence(test), wanted)

    @pytest.mark.parametrize("loss", ["cross_entropy", CrossEntropy(weight=[1.0, 2.0, 50.0])])
    @pytest.mark.parametrize("weighed", [False, True])
    @pytest.mark.parametrize("method", [STRIDE, partial(DiagonalEKFAC, residuals="temperature")])
    def test_they_are_weighed_as_held_out_data_are(self, planted, loss, weighed, method):
        """Of the same seen and unseen examples, both give the same temperature."""
        model, (x, y), half = planted[0], planted[1].tensors, N_TRAIN // 2
        y = torch.where((torch.arange(N_TRAIN) >= half) & (torch.arange(N_TRAIN) % 3 == 0), (y + 1) % 3, y)
        rows = (x, torch.linspace(1, 9, N_TRAIN), y) if weighed else (x, y)
        checkpoints = [Checkpoint(sharper(model.state_dict(), 20.0), seen=range(half))]
        options = {"loss": loss, "batch": Batch(sample_weight=1) if weighed else None}
        by_seen = method(model, TensorDataset(*rows), checkpoints=checkpoints, **options).fit()
        by_held_out = method(
            model,
            TensorDataset(*(part[:half] for part in rows)),
            checkpoints=[checkpoints[0].weights],
            held_out=TensorDataset(*(part[half:] for part in rows)),
            **options,
        ).fit()
        found, wanted = (self.temperature(each) for each in (by_held_out, by_seen))
        assert found == wanted
        assert 1 < found < 100

    def temperature(self, method):
        state = method._states[0]
        return state.operators.temperature if isinstance(method, STRIDE) else state.temperature

    def test_held_out_examples_without_weights_count_once(self, planted):
        model, (x, y), test = planted[0], planted[1].tensors, planted[2]
        weights = torch.linspace(1, 9, N_TRAIN)
        given = STRIDE(model, planted[1], held_out=test, batch=Batch(sample_weight=weights))
        placed = STRIDE(model, TensorDataset(x, weights, y), held_out=test, batch=Batch(sample_weight=1))
        assert temperatures(given) == temperatures(placed)
        nothing = TensorDataset(test.tensors[0], torch.zeros(len(test)), test.tensors[1])
        placed.held_out = nothing
        with pytest.raises(ValueError, match="`held_out` must hold an example with a weight above 0"):
            placed.fit()

    @pytest.mark.parametrize("first", [True, False])
    def test_examples_that_count_for_nothing_are_refused(self, planted, first):
        model, train, _ = planted
        weights = torch.ones(N_TRAIN)
        half = slice(0, N_TRAIN // 2) if first else slice(N_TRAIN // 2, N_TRAIN)
        weights[half] = 0
        seen = [Checkpoint(model.state_dict(), seen=range(N_TRAIN // 2))]
        kind = "seen" if first else "left out"
        match = f"`seen` must leave out and hold examples .* none of these among those that are {kind}"
        weighed = STRIDE(model, train, checkpoints=seen, batch=Batch(sample_weight=weights))
        with pytest.raises(ValueError, match=match):
            weighed.fit()
        x, y = train.tensors
        labels = y[:, None].repeat(1, 2)
        labels[half] = -100
        tokens = TensorDataset(torch.stack([x, x], 1), labels)
        with pytest.raises(ValueError, match=match):
            STRIDE(model, tokens, checkpoints=seen).fit()

    def test_all_or_none_of_them_is_refused(self, planted):
        model, train, _ = planted
        for seen, must in ((range(N_TRAIN), "leave out some training"), ([], "hold at least one place")):
            method = STRIDE(model, train, checkpoints=[Checkpoint(model.state_dict(), seen=seen)])
            with pytest.raises(ValueError, match=f"`seen` must {must}"):
                method.fit()
        wrong = STRIDE(model, train, checkpoints=[Checkpoint(model.state_dict(), seen=[99])])
        with pytest.raises(ValueError, match="`seen`"):
            wrong.fit()

    def test_weights_may_be_all_that_checkpoints_may(self, planted, tmp_path):
        model, train, test = planted
        torch.save(model.state_dict(), tmp_path / "a.pt")
        wanted = STRIDE(model, train).influence(test)
        for weights in (model.state_dict(), str(tmp_path / "a.pt")):
            found = STRIDE(model, train, checkpoints=[Checkpoint(weights)])
            assert torch.equal(found.influence(test), wanted)


class TestWhichCheckpoints:
    def test_places(self):
        assert log_positions(1) == [1]
        assert log_positions(4) == [1, 2, 3, 4]
        assert log_positions(8) == [1, 2, 3, 5, 8]
        assert log_positions(250) == [1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 250]
        assert log_epochs(12) == [1, 2, 3, 5, 8]
        assert even_epochs(20, 3) == [5, 10, 15]

    def test_of_a_folder(self, tmp_path, planted):
        for step in range(100, 1600, 100):
            torch.save(planted[0].state_dict(), tmp_path / f"step-{step}.pt")
        found = [path.rpartition("-")[2] for path in along_training(tmp_path)]
        assert found == ["100.pt", "200.pt", "300.pt", "500.pt", "800.pt", "1200.pt", "1500.pt"]
        few = STRIDE(*planted[:2], checkpoints=along_training(tmp_path)[:2])
        assert len(few.checkpoints) == 2

    def test_files_beside_one_that_hold_the_same_names(self, tmp_path, planted):
        state = planted[0].state_dict()
        for name in ("epoch-1.pt", "epoch-2.pt", "epoch-10.pt"):
            torch.save(state, tmp_path / name)
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "last.safetensors")
        torch.save({"other.weight": torch.zeros(2)}, tmp_path / "head.pt")
        (tmp_path / "broken.pt").write_bytes(b"none")
        torch.save({"step": 3}, tmp_path / "optimizer.pt")
        found = [path.name for path in files_like(tmp_path / "epoch-2.pt")]
        assert found == ["epoch-1.pt", "epoch-10.pt", "last.safetensors"]
        assert files_like(tmp_path / "head.pt") == []
        assert files_like(tmp_path / "broken.pt") == []

    @pytest.mark.slow
    def test_explain_says_so(self, tmp_path, planted):
        task = load_task("digits", preset="smoke")
        for name in ("a.pt", "b.pt"):
            torch.save(task.build_model().state_dict(), tmp_path / name)
        arguments = ["explain", "--preset", "smoke", "--index", "0", "--checkpoint", str(tmp_path / "a.pt")]
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
        assert "1 other file in" in " ".join(result.output.split())

    def test_every_row_has_one_with_checkpoints(self):
        spec = find_method("EKFAC, out-of-sample residuals, checkpoints")
        assert spec.epochs(20) == [1, 2, 3, 5, 8, 12]
        assert spec.grid == METHODS["EKFAC, out-of-sample residuals"].grid
        assert spec.name == "EKFAC, out-of-sample residuals, checkpoints"
        with pytest.raises(ValueError, match="`methods` must be one of"):
            find_method("EKFAK, checkpoints")


def test_the_data_set_is_read_in_the_order_of_the_checkpoints(planted):
    """A third kind of weights among them, with the mean of what each gives."""
    model, train, test = planted
    weights = [model.state_dict(), trained(MLP, seed=3)[0].state_dict()]
    both = STRIDE(model, TensorDataset(*train.tensors), checkpoints=weights)
    first, second = temperatures(both)
    parts = [
        STRIDE(model, train, checkpoints=[w], operators=ClosedForm(residuals="temperature", temperature=t))
        for w, t in zip(weights, (first, second), strict=True)
    ]
    wanted = (parts[0].influence(test) + parts[1].influence(test)) / 2
    torch.testing.assert_close(both.influence(test), wanted)
