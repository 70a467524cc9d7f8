"""A feature store whose examples have several positions: a row for each position that has a label."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE, Batch, ClosedForm
from stride_captum.conformance.toy_problems import IGNORED, MLP, N_TRAIN, BatchNormCNN, posed_with, trained
from stride_captum.features.store import FeatureStore
from stride_captum.influence.estimate import Estimate
from stride_captum.losses import CrossEntropy

FORMS = ["rows", "matrix"]


@pytest.fixture
def tokens():
    with posed_with("positions"):
        return trained(MLP)


def stored(model, train, folder, form="rows", chunk="1KiB", **options) -> STRIDE:
    """Features in chunks of a few examples."""
    operators = ClosedForm(form=form, **options.pop("operators", {}))
    store = folder if isinstance(folder, FeatureStore) else FeatureStore(folder, chunk=chunk)
    return STRIDE(model, train, operators=operators, feature_store=store, batch_size=7, **options)


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def same_answers(found: STRIDE, wanted: STRIDE, test) -> None:
    same(found.influence(test), wanted.influence(test))
    same(found.influence(test, normalize="cosine"), wanted.influence(test, normalize="cosine"))
    same(found.influence(test, per_position=True), wanted.influence(test, per_position=True))
    same(found.self_influence(), wanted.self_influence())
    same(found.mislabel_scores(), wanted.mislabel_scores())


class Counted(nn.Module):
    """Counts the examples that a network has seen."""

    def __init__(self, network: nn.Module, most: int | None = None) -> None:
        super().__init__()
        self.network, self.seen, self.most = network, 0, most

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        if self.most is not None and self.seen > self.most:
            raise KeyboardInterrupt
        return self.network(x)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"residuals": "temperature", "curvature": "gauss-newton"}])
def test_scores_are_those_of_features_in_memory(tokens, tmp_path, form, options):
    model, train, test = tokens
    memory = STRIDE(model, train, operators=ClosedForm(form=form, **options), batch_size=7)
    same_answers(stored(model, train, tmp_path, form, operators=options), memory, test.tensors)


def test_positions_of_a_class_without_weight_are_no_rows_of_the_store(tokens, tmp_path):
    """A folder that was filled with all classes is not read without one of them."""
    model, train, test = tokens
    stored(model, train, tmp_path).fit()
    loss = CrossEntropy(weight=[1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="classes of weight 0"):
        stored(model, train, tmp_path, loss=loss).fit()
    wanted = STRIDE(model, train, loss=loss).influence(test.tensors)
    same(stored(model, train, tmp_path / "other", loss=loss).influence(test.tensors), wanted)


def test_pixels_and_a_folder_that_is_filled_by_one_form_and_read_by_the_other(tmp_path):
    with posed_with("positions"):
        model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    for form in FORMS:
        memory = STRIDE(model, train, operators=ClosedForm(form=form))
        same_answers(stored(model, train, tmp_path, form, chunk="8KiB"), memory, test.tensors)


def test_a_second_fit_runs_no_training_example_and_gives_the_same_bits(tokens, tmp_path):
    model, train, test = Counted(tokens[0]), *tokens[1:]
    first = stored(model, train, tmp_path).influence(test.tensors)
    model.seen = 0
    again = stored(model, train, tmp_path).fit()
    assert model.seen == 0
    assert torch.equal(again.influence(test.tensors), first)
    assert again.operators_.features.shape == (int((train.tensors[1] != IGNORED).sum()), 21 - 6 - 2)


@pytest.mark.parametrize("shape", [(N_TRAIN, 5), (N_TRAIN, 1)])
def test_weights_of_another_shape_are_refused_by_a_whole_store(tokens, tmp_path, shape):
    model, train, _ = tokens
    assert train.tensors[1].shape == (N_TRAIN, 4)
    STRIDE(model, train, feature_store=tmp_path / "store").fit()
    for store in (None, tmp_path / "store"):
        batch = Batch(sample_weight=torch.ones(shape))
        with pytest.raises(ValueError, match="`sample_weight` must hold one for each example, or"):
            STRIDE(model, train, feature_store=store, batch=batch).fit()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "outputs", "whole"),
    [
        ("mse", 2, False),
        ("mse", 2, True),
        ("mse", 1, False),
        ("mse", 1, True),
        ("binary_cross_entropy", 2, True),
        ("cross_entropy", 2, False),
    ],
)
def test_weights_beside_labels_that_are_no_indices(loss, outputs, whole, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))
    x, labels = torch.randn(10, 4, 3), torch.rand(10, 4, 2).softmax(-1)[..., :outputs]
    labels = labels.round().long() if whole else labels
    train = TensorDataset(x, labels)
    STRIDE(model, train, loss=loss, feature_store=tmp_path).fit()
    for store in (None, tmp_path):
        for wrong in (2, 6, 8):
            method = STRIDE(
                model,
                train,
                loss=loss,
                feature_store=store,
                batch=Batch(sample_weight=torch.rand(10, wrong)),
            )
            match = rf"`sample_weight` must hold one for each example, or \(10, 4\).*\(10, {wrong}\)"
            with pytest.raises(ValueError, match=match):
                method.fit()
    batch = Batch(sample_weight=torch.rand(10, 4))
    found = STRIDE(model, train, loss=loss, feature_store=tmp_path, batch=batch).influence(train[:2])
    wanted = STRIDE(model, train, loss=loss, batch=batch).influence(train[:2])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("most", [8, 20, 40])
def test_an_interrupted_store_resumes(tokens, tmp_path, most):
    network, train, test = tokens
    whole = stored(Counted(network), train, tmp_path / "whole").influence(test.tensors)
    with pytest.raises(KeyboardInterrupt):
        stored(Counted(network, 14 + most), train, tmp_path / "store").fit()  # a few are run to choose layers
    for name in ("features", "counts"):  # a killed process has written more than the manifest lists
        path = tmp_path / "store" / f"{name}.bin"
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"torn")
    model = Counted(network)
    assert torch.equal(stored(model, train, tmp_path / "store").influence(test.tensors), whole)
    files = [sorted(folder.glob("*.bin")) for folder in (tmp_path / "whole", tmp_path / "store")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_beside_a_store_reads_it_again(tokens, tmp_path, form):
    model, train, test = tokens
    method = stored(model, train, tmp_path / "store", form)
    scores = method.influence(test.tensors)
    method.save(tmp_path / "method")
    loaded = STRIDE.load(tmp_path / "method", model, train)
    assert torch.equal(loaded.influence(test.tensors), scores)
    assert torch.equal(loaded.self_influence(), method.self_influence())
    if form == "rows":
        in_memory = STRIDE(model, train, operators=ClosedForm(form=form)).fit()
        in_memory.save(tmp_path / "whole")
        sizes = [(tmp_path / name).stat().st_size for name in ("method", "whole")]
        assert sizes[0] + method.operators_.features.nbytes < sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("per_position", [False, True])
def test_weights_of_examples_and_of_positions(tokens, tmp_path, per_position):
    model, train, test = tokens
    weights = torch.rand(train.tensors[1].shape if per_position else N_TRAIN)
    options = {"batch": Batch(sample_weight=weights)}
    memory = STRIDE(model, train, operators=ClosedForm(form="rows"), **options)
    for _ in range(2):  # filled, and read
        same_answers(stored(model, train, tmp_path, **options), memory, test.tensors)


@pytest.mark.slow
def test_examples_of_several_lengths(tokens, tmp_path):
    model, train, test = tokens
    x, y = train.tensors
    batches = [(x[i : i + 4, : 2 + i % 3], y[i : i + 4, : 2 + i % 3]) for i in range(0, 40, 4)]
    loader = DataLoader(batches, batch_size=None)
    found = stored(model, loader, tmp_path, chunk="300")
    same_answers(found, STRIDE(model, loader, operators=ClosedForm(form="rows")), test.tensors)


class TestRefused:
    def test_another_model_other_examples_and_another_ignored_label(self, tokens, tmp_path):
        model, train, _ = tokens
        stored(model, train, tmp_path).fit()
        x, y = train.tensors
        other = y.clone()
        other[9, 1] = IGNORED
        with pytest.raises(ValueError, match=r"must hold .* (others among examples|other data)"):
            stored(model, TensorDataset(x, other), tmp_path).fit()
        with pytest.raises(ValueError, match="other positions"):
            stored(model, train, tmp_path, loss=CrossEntropy(ignore_index=2)).fit()
        with torch.no_grad():
            model.fc1.weight[0, 0] += 1
        with pytest.raises(ValueError, match=r"must hold features of this model, .* other weights"):
            stored(model, train, tmp_path).fit()

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["features", "counts", "places"])
    def test_a_damaged_file(self, tokens, tmp_path, name):
        model, train, _ = tokens
        stored(model, train, tmp_path).fit()
        path = tmp_path / f"{name}.bin"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"other bytes in .*{name}"):
            stored(model, train, tmp_path).fit()

    def test_labels_that_are_all_ignored(self, tokens, tmp_path):
        model, train, _ = tokens
        none = TensorDataset(train.tensors[0], torch.full_like(train.tensors[1], IGNORED))
        for _ in range(2):
            with pytest.raises(ValueError, match="at least one label that is not ignored"):
                stored(model, none, tmp_path).fit()

    def test_values_that_are_not_finite_are_named_by_example(self, tokens, tmp_path):
        model, train, _ = tokens
        x = train.tensors[0].clone()
        x[9, 0] = torch.inf
        for _ in range(2):
            with pytest.raises(ValueError, match="NaN or infinity for example 9"):
                stored(model, TensorDataset(x, train.tensors[1]), tmp_path).fit()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_disk_that_a_store_takes(tokens, tmp_path, dtype, monkeypatch):
    seconds = {"fit_seconds": 1.0, "query_seconds": 1.0, "fit_bytes": 0, "query_bytes": 0, "basis": "runs"}
    monkeypatch.setattr(
        "stride_captum.closed_form.position_estimate.from_small_runs",
        lambda method, n_test, k: Estimate(n_train=N_TRAIN, n_test=n_test, k=k, disk_bytes=0, **seconds),
    )
    model, train, _ = tokens
    full = TensorDataset(train.tensors[0], train.tensors[1].clamp_min(0))
    method = stored(model, full, replace(FeatureStore(tmp_path), dtype=dtype))
    expected = method.estimate(5).disk_bytes
    assert list(tmp_path.iterdir()) == []
    method.fit()
    assert expected == sum(file.stat().st_size for file in tmp_path.glob("*.bin"))
