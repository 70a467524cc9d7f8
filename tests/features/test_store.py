from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flat_options import arguments
from planted import MLP, HuggingFaceLike, ListOfDicts, built, expect_untouched, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stride_captum import STRIDE, Batch
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Reading
from stride_captum.features.store import FeatureStore
from stride_captum.features.store_files import FORMAT, StoreFiles, _manifest_checksum

TRAINED = arguments(operators="trained", n_subsets=8, rank=4, iterations=5)
CONFIGS = {
    "closed-form": arguments(),
    "gauss-newton": arguments(curvature="gauss-newton"),
    "trained": TRAINED,
}
BATCH = 5
CHUNK = "1KiB"  # a few of the 48 examples


class Counting:
    """Counts the forward passes of a model and the examples in them."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = self.examples = 0
        self._handle = model.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.passes += 1
        self.examples += len(output)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


class OneByOne(Dataset):
    """Examples that only `__getitem__` gives, as image folders do."""

    def __init__(self, *tensors) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, i):
        return tuple(tensor[i] for tensor in self.tensors)


def stored(model, train, folder, config=None, **options) -> STRIDE:
    store = FeatureStore(folder, chunk=CHUNK, **options)
    return STRIDE(model, train, batch_size=BATCH, **(config or {}), feature_store=store)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scores_have_the_bits_of_those_without_a_store_and_later_runs_make_no_forward_pass(
    planted, tmp_path, config
):
    model, train, test = planted
    plain = STRIDE(model, train, batch_size=BATCH, **config).fit()
    first = stored(model, train, tmp_path, config)
    with Counting(model) as counted, expect_untouched(model):
        first.fit()
    assert counted.examples >= len(train)
    assert len(manifest(tmp_path)["chunks"]) > 3
    later = stored(model, train, tmp_path, config)
    with Counting(model) as counted:
        later.fit()
    assert counted.passes == 0
    for method in (first, later):
        assert torch.equal(method.influence(test.tensors), plain.influence(test.tensors))
        assert torch.equal(method.influence(test.tensors, 4)[0], plain.influence(test.tensors, 4)[0])
        assert torch.equal(method.self_influence(), plain.self_influence())
        assert torch.equal(method.mislabel_scores(), plain.mislabel_scores())
        assert method.layers_ == plain.layers_


@pytest.mark.slow
def test_other_options_start_from_the_same_store(planted, tmp_path):
    model, train, test = planted
    stored(model, train, tmp_path).fit()
    for config in (arguments(damping=1.0, residuals="temperature"), TRAINED):
        with Counting(model) as counted:
            method = stored(model, train, tmp_path, config).fit()
        assert counted.passes == 0
        plain = STRIDE(model, train, batch_size=BATCH, **config)
        assert torch.equal(method.influence(test.tensors), plain.influence(test.tensors))


@pytest.mark.slow
def test_the_closed_form_reads_the_map_and_copies_no_more_than_a_block(tmp_path):
    torch.manual_seed(0)
    n, d = 4_000, 256
    model = nn.Sequential(nn.Linear(4, d), nn.ReLU(), nn.Linear(d, 3)).eval()
    x, y = torch.randn(n, 4), torch.randint(0, 3, (n,))
    config = arguments(memory_budget="1MiB", select="penultimate")
    for dtype in ("float32", "bfloat16"):
        store = FeatureStore(tmp_path / dtype, dtype=dtype, chunk="256KiB")
        method = STRIDE(model, TensorDataset(x, y), batch_size=128, **config, feature_store=store)
        with Allocated() as seen:
            method.fit()
            method.influence((x[:3], y[:3]), 5)
            method.influence((x[:1], y[:1]))
            method.influence((x[:3], y[:3]), 5, normalize="cosine")
            method.self_influence()
        assert seen.largest < n * d * 4 / 3, dtype


class Allocated(TorchDispatchMode):
    """The largest storage in bytes that an operation has made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class TestMismatch:
    def refused(self, model, train, folder, match, **options):
        with Counting(model) as counted, pytest.raises(ValueError, match=match):
            stored(model, train, folder, **options).fit()
        assert counted.passes == 0

    def test_each_item_of_the_key_that_differs_is_named(self, tmp_path):
        model, train, _ = trained(MLP)
        stored(model, train, tmp_path).fit()
        x, y = train.tensors
        self.refused(model, TensorDataset(x.flip(0), y), tmp_path, r"other data \(\w{8}\.\.\. there, \w{8}")
        self.refused(model, train, tmp_path, r"other dtype \(float32 there, bfloat16", dtype="bfloat16")
        with pytest.raises(ValueError, match=r"other layers \(all, at most 4096 there, fc1 here\)"):
            STRIDE(model, train, layers=["fc1"], feature_store=FeatureStore(tmp_path, chunk=CHUNK)).fit()
        with pytest.raises(ValueError, match=r"other chunk \(1024 there, 2048 here\)"):
            STRIDE(model, train, feature_store=FeatureStore(tmp_path, chunk=2048)).fit()
        with torch.no_grad():
            model.fc1.weight[0, 0] += 1
        both = r"other data .*; other weights .*Give another folder, or delete this one"
        self.refused(model, TensorDataset(x.flip(0), y), tmp_path, both)

    def test_other_modules_with_the_same_weights(self, tmp_path):
        def network(activation):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 3)).eval()

        train = TensorDataset(torch.randn(20, 6), torch.arange(20) % 3)
        stored(network(nn.ReLU()), train, tmp_path).fit()
        self.refused(network(nn.Tanh()), train, tmp_path, "with other modules")

    def test_labels_under_another_key_and_another_forward(self, tmp_path):
        model, train, _ = trained(MLP)
        x, y = train.tensors
        data = [{"x": a, "a": b, "b": (b + 1) % 3} for a, b in zip(x, y, strict=True)]

        def scaled(by):
            return lambda network, batch: network(by * batch["x"])

        def method(label_key, forward):
            batch = Batch(label_key=label_key, forward=forward)
            return STRIDE(model, Rows(data), batch=batch, feature_store=FeatureStore(tmp_path)).fit()

        method("a", scaled(1.0))
        method("a", scaled(1.0))
        with pytest.raises(ValueError, match=r"other labels \(label_key='a' there, label_key='b' here\)"):
            method("b", scaled(1.0))
        for other in (scaled(2.0), lambda network, batch: network(batch["x"])):
            with pytest.raises(ValueError, match="with other forward"):
                method("a", other)

    @pytest.mark.slow
    def test_one_changed_example_that_the_samples_of_the_fingerprint_miss(self, tmp_path):
        model, _, _ = trained(MLP)
        x, y = torch.randn(300, *MLP.shape, generator=torch.Generator().manual_seed(1)), torch.arange(300) % 3
        stored(model, OneByOne(x, y), tmp_path).fit()
        changed = x.clone()
        changed[130, 0] += 1
        chunks, rows = manifest(tmp_path)["chunks"], manifest(tmp_path)["chunk_rows"]
        first = 130 // rows * rows
        assert len(chunks) > 10
        match = (
            f"`train_dataset` must hold the examples .* others among examples {first} to {first + rows - 1}"
        )
        self.refused(model, OneByOne(changed, y), tmp_path, match)
        relabelled = y.clone()
        relabelled[130] = (y[130] + 1) % 3
        self.refused(model, OneByOne(x, relabelled), tmp_path, "others among examples")
        with Counting(model) as counted:
            stored(model, OneByOne(changed, y), tmp_path, check_examples=False).fit()
        assert counted.passes == 0

    def test_weights_with_columns(self, planted, tmp_path):
        model, train, _ = planted
        for _ in range(2):  # an empty store, and a whole one
            weighed = stored(model, train, tmp_path)
            weighed.batch = Batch(sample_weight=torch.ones(len(train), 1))
            with pytest.raises(
                ValueError, match="`sample_weight` must hold one for each example; got the sh"
            ):
                weighed.fit()
            stored(model, train, tmp_path).fit()

    def test_what_a_store_cannot_be(self, planted, tmp_path):
        model, train, _ = planted
        file = tmp_path / "file"
        file.write_text("")
        with pytest.raises(ValueError, match="`feature_store` must name a folder; got the file"):
            STRIDE(model, train, feature_store=file)
        with pytest.raises(
            TypeError, match="`feature_store` must be the path of a folder, or a FeatureStore"
        ):
            STRIDE(model, train, feature_store=3)
        with pytest.raises(ValueError, match="`dtype` must be one of 'float32', 'bfloat16', 'float16'"):
            FeatureStore(tmp_path, dtype="int8")
        with pytest.raises(ValueError, match="`chunk` must be a positive number of bytes"):
            FeatureStore(tmp_path, chunk="much")


class TestDamage:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["features.bin", "logits.bin", "labels.bin"])
    def test_a_flipped_bit_is_found_by_its_checksum(self, planted, tmp_path, name):
        model, train, _ = planted
        stored(model, train, tmp_path).fit()
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        rows = manifest(tmp_path)["chunk_rows"]
        start = len(train) // 2 // rows * rows
        match = f"must hold what was written to it; got other bytes in .*{name} for rows {start} to"
        with pytest.raises(ValueError, match=match):
            stored(model, train, tmp_path).fit()
        stored(model, train, tmp_path, verify=False).fit()

    def test_a_file_that_was_cut_off_is_found(self, planted, tmp_path):
        model, train, _ = planted
        stored(model, train, tmp_path).fit()
        path = tmp_path / "features.bin"
        path.write_bytes(path.read_bytes()[:-1])
        for verify in (True, False):
            with pytest.raises(ValueError, match=r"got [\d,]+ of [\d,]+ bytes in .*features\.bin"):
                stored(model, train, tmp_path, verify=verify).fit()
        path.unlink()
        for verify in (True, False):
            with pytest.raises(ValueError, match=r"got no file .*features\.bin\. Delete the folder"):
                stored(model, train, tmp_path, verify=verify).fit()

    def test_a_changed_manifest_is_refused(self, planted, tmp_path):
        model, train, _ = planted
        stored(model, train, tmp_path).fit()
        path = tmp_path / "manifest.json"
        whole = path.read_text()
        for damaged in (whole[:-20], whole.replace('"chunk_rows": ', '"chunk_rows": 1')):
            path.write_text(damaged)
            with pytest.raises(ValueError, match="`feature_store` must have a whole manifest; got a damaged"):
                stored(model, train, tmp_path).fit()
        path.write_text(whole.replace(f'"format": {FORMAT}', '"format": 99'))
        with pytest.raises(ValueError, match=f"must be in format {FORMAT}; got format 99"):
            stored(model, train, tmp_path).fit()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.pop("chunk_rows"),
            lambda m: m.update(more=1),
            lambda m: m.update(chunk_rows="8"),
            lambda m: m.update(chunks=[[]]),
            lambda m: m["chunks"][0].update(rows=-1),
            lambda m: m["chunks"][1]["checksums"].pop("logits"),
            lambda m: m["parts"].pop("labels"),
            lambda m: m["parts"]["features"].update(dtype="load"),
            lambda m: m["parts"]["features"].update(dtype="int8"),
            lambda m: m["parts"]["features"].update(width=0),
        ],
    )
    def test_a_manifest_of_another_kind_is_refused(self, planted, tmp_path, change):
        model, train, _ = planted
        stored(model, train, tmp_path).fit()
        rewrite_manifest(tmp_path, change)
        with pytest.raises(ValueError, match="`feature_store` must have a whole manifest; got a damaged"):
            stored(model, train, tmp_path).fit()

    @pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"null"])
    def test_a_manifest_that_is_none_is_refused(self, planted, tmp_path, content):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match="`feature_store` must have a whole manifest; got a damaged"):
            stored(*planted[:2], tmp_path).fit()

    def test_features_that_float16_cannot_hold(self, planted, tmp_path):
        model, train, _ = planted
        x, y = train.tensors
        with pytest.raises(
            ValueError, match="`dtype` must hold the features; got infinity or NaN in 'float16'"
        ):
            stored(model, TensorDataset(1e6 * x, y), tmp_path, dtype="float16").fit()


def rewrite_manifest(folder: Path, change) -> None:
    """Change a manifest so that its checksum is right."""
    content = manifest(folder)
    del content["checksum"], content["format"]
    change(content)
    content = {"format": FORMAT, "checksum": _manifest_checksum(content), **content}
    (folder / "manifest.json").write_text(json.dumps(content))


class TestLinks:
    """Whoever may write to the folder could else have a file elsewhere overwritten or read."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["lock", "manifest.json", "features.bin", "logits.bin", "labels.bin"])
    @pytest.mark.parametrize("complete", [False, True])
    def test_a_file_that_is_a_link_is_refused(self, planted, tmp_path, name, complete):
        model, train, _ = planted
        folder, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
        if complete:
            stored(model, train, folder).fit()
            (folder / name).replace(elsewhere)
        else:
            folder.mkdir()
            elsewhere.write_bytes(b"precious")
        before = elsewhere.read_bytes()
        (folder / name).symlink_to(elsewhere)
        with pytest.raises(ValueError, match=rf"must hold files, not links; got the link '.*{name}'"):
            stored(model, train, folder).fit()
        assert elsewhere.read_bytes() == before

    def test_a_link_to_nothing_is_refused(self, planted, tmp_path):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "lock").symlink_to(tmp_path / "nothing")
        with pytest.raises(ValueError, match="not links"):
            stored(*planted[:2], tmp_path / "store").fit()
        assert not (tmp_path / "nothing").exists()

    def test_the_folder_itself_may_be_one(self, planted, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "store").symlink_to(tmp_path / "disk")
        stored(*planted[:2], tmp_path / "store").fit()
        assert manifest(tmp_path / "disk")["complete"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["../secret", "/etc/secret", "folder/secret"])
    def test_parts_outside_the_folder_are_refused(self, planted, tmp_path, name):
        model, train, _ = planted
        stored(model, train, tmp_path / "store").fit()

        def add(content) -> None:
            content["parts"][name] = content["parts"]["labels"]
            for chunk in content["chunks"]:
                chunk["checksums"][name] = chunk["checksums"]["labels"]

        rewrite_manifest(tmp_path / "store", add)
        with pytest.raises(
            ValueError, match=rf"keep its files in its own folder; got .* names '{name}\.bin'"
        ):
            stored(model, train, tmp_path / "store").fit()


class Stream(IterableDataset):
    def __init__(self, *tensors) -> None:
        self.tensors = tensors

    def __iter__(self):
        return iter(zip(*self.tensors, strict=True))


class Augmented(OneByOne):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn_like(x), y


class TestUnusualSources:
    def test_a_stream_is_compared_as_a_whole(self, planted, tmp_path):
        model, train, test = planted
        x, y = train.tensors
        first = stored(model, Stream(x, y), tmp_path).fit()
        with Counting(model) as counted:
            later = stored(model, Stream(x, y), tmp_path).fit()
        assert counted.passes == 0
        assert torch.equal(later.influence(test.tensors), first.influence(test.tensors))
        with pytest.raises(ValueError, match=r"others among examples .* if examples differ from one reading"):
            stored(model, Stream(x, y.roll(1)), tmp_path).fit()
        with pytest.raises(ValueError, match=r"others among examples|40 examples, not 48"):
            stored(model, Stream(x[:40], y[:40]), tmp_path).fit()
        with pytest.raises(
            ValueError, match=r"`check_examples` must be True for an iterable data set, .*; got False"
        ):
            stored(model, Stream(x, y), tmp_path, check_examples=False).fit()

    @pytest.mark.parametrize("check_examples", [True, False])
    def test_examples_that_are_augmented_at_random_are_refused_at_once(
        self, planted, tmp_path, check_examples
    ):
        model, train, _ = planted
        match = r"`train_dataset` must give the same example each time .* Turn random augmentation off"
        with Counting(model) as counted, pytest.raises(ValueError, match=match):
            stored(model, Augmented(*train.tensors), tmp_path, check_examples=check_examples).fit()
        assert counted.passes == 0
        assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[2])
from planted import MLP, trained
from stride_captum import STRIDE
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Reading
from stride_captum.features.store import FeatureStore

torch.set_num_threads(1)
model, train, _ = trained(MLP)
examples = 0

def count(module, inputs, output):
    global examples
    examples += len(output)
    if examples > 45:  # some of which look at the model before it starts
        os.kill(os.getpid(), signal.SIGKILL)

model.register_forward_hook(count)
STRIDE(model, train, batch_size=5, feature_store=FeatureStore(sys.argv[1], chunk="1KiB")).fit()
"""


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_behind_the_last_whole_chunk(planted, tmp_path):
    model, train, test = planted
    folder = tmp_path / "store"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parents[1])])
    assert ended.returncode == -signal.SIGKILL
    left = manifest(folder)
    whole, rows = sum(chunk["rows"] for chunk in left["chunks"]), left["chunk_rows"]
    assert not left["complete"]
    assert whole >= 20
    assert whole % rows == 0
    # As if it had been killed while it wrote the next chunk.
    with open(folder / "features.bin", "ab") as file:
        file.write(b"half a chunk")
    (folder / "manifest.json.part").write_text("{")
    method = stored(model, train, folder)
    with Counting(model) as counted:
        method.fit()
    assert counted.examples == len(train) - whole // BATCH * BATCH  # the batch at the seam runs as a whole
    assert manifest(folder)["chunks"][: len(left["chunks"])] == left["chunks"]
    plain = STRIDE(model, train, batch_size=BATCH)
    assert torch.equal(method.influence(test.tensors), plain.influence(test.tensors))
    uninterrupted = tmp_path / "uninterrupted"
    stored(model, train, uninterrupted).fit()
    assert manifest(folder) == manifest(uninterrupted)
    for name in ("features.bin", "logits.bin", "labels.bin"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_store_that_was_half_built_from_other_examples_is_not_continued(planted, tmp_path):
    model, train, _ = planted
    x, y = (tensor.repeat(10, *[1] * (tensor.ndim - 1)) for tensor in train.tensors)

    def stop(module, inputs, output):
        stop.passes += 1
        if stop.passes > 60:
            raise InterruptedError

    stop.passes = 0
    handle = model.register_forward_hook(stop)
    with pytest.raises(InterruptedError):
        stored(model, OneByOne(x, y), tmp_path).fit()
    handle.remove()
    changed = x.clone()
    changed[100] += 1  # between the samples of the fingerprint
    assert 0 < sum(chunk["rows"] for chunk in manifest(tmp_path)["chunks"]) < len(x)
    with pytest.raises(ValueError, match="others among examples"):
        stored(model, OneByOne(changed, y), tmp_path).fit()
    with pytest.raises(ValueError, match=r"must hold a whole store in .* got only the first"):
        FeatureStore(tmp_path, chunk=CHUNK).open(manifest(tmp_path)["key"])


class TestSaving:
    @pytest.mark.slow
    @pytest.mark.parametrize("config", [arguments(), TRAINED], ids=["closed-form", "trained"])
    def test_a_saved_method_leaves_the_features_in_the_store(self, planted, tmp_path, config):
        model, train, test = planted
        method = stored(model, train, tmp_path / "store", config).fit()
        method.save(tmp_path / "method")
        with Counting(model) as counted:
            loaded = STRIDE.load(tmp_path / "method", model, train)
        assert counted.passes == 0
        assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))
        assert torch.equal(loaded.self_influence(), method.self_influence())
        assert str(loaded.feature_store.path) == str(tmp_path / "store")
        (tmp_path / "store").rename(tmp_path / "moved")
        moved = FeatureStore(tmp_path / "moved", chunk=CHUNK)
        again = STRIDE.load(tmp_path / "method", model, train, feature_store=moved)
        assert torch.equal(again.influence(test.tensors), method.influence(test.tensors))

    def test_the_file_is_smaller_by_the_features_and_needs_the_store(self, planted, tmp_path):
        model, train, _ = planted
        for name, method in (
            ("plain", STRIDE(model, train, batch_size=BATCH)),
            ("stored", stored(model, train, tmp_path / "store")),
        ):
            method.fit().save(tmp_path / name)
        sizes = [(tmp_path / name).stat().st_size for name in ("plain", "stored")]
        assert sizes[0] - sizes[1] > 0.9 * (tmp_path / "store" / "features.bin").stat().st_size - 500
        (tmp_path / "store").rename(tmp_path / "moved")
        with pytest.raises(ValueError, match=r"must hold a whole store in .*; got nothing"):
            STRIDE.load(tmp_path / "stored", model, train)

    def test_each_checkpoint_has_a_folder(self, tmp_path):
        (first, train, test), (second, _, _) = trained(MLP), trained(MLP)
        with torch.no_grad():
            second.fc1.weight.mul_(1.5)
        checkpoints = [first.state_dict(), second.state_dict()]
        options = {"batch_size": BATCH, "checkpoints": checkpoints}
        method = STRIDE(
            first, train, feature_store=FeatureStore(tmp_path / "s", chunk=CHUNK), **options
        ).fit()
        plain = STRIDE(first, train, **options)
        assert torch.equal(method.influence(test.tensors), plain.influence(test.tensors))
        method.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", first, train, checkpoints=checkpoints)
        assert torch.equal(loaded.influence(test.tensors), plain.influence(test.tensors))


class TestDtypes:
    @pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.97), ("float16", 0.999)])
    def test_half_precision_keeps_the_ranks(self, planted, tmp_path, dtype, least):
        model, train, test = planted
        plain = STRIDE(model, train, batch_size=BATCH).influence(test.tensors)
        half = stored(model, train, tmp_path, dtype=dtype)
        scores = half.influence(test.tensors)
        assert (tmp_path / "features.bin").stat().st_size == len(train) * half._states[
            0
        ].operators.features.shape[1] * 2
        ranks = [torch.from_numpy(np.argsort(np.argsort(s.numpy()))).double() for s in (plain, scores)]
        agreement = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True)]
        assert min(agreement) > least
        assert not torch.equal(plain, scores)

    def test_a_float64_model_is_rounded_to_float32(self, tmp_path):
        model, train, test = trained(MLP)
        model, x, y = model.double(), train.tensors[0].double(), train.tensors[1]
        test = test.tensors[0].double(), test.tensors[1]
        plain = STRIDE(model, TensorDataset(x, y)).influence(test)
        scores = stored(model, TensorDataset(x, y), tmp_path).influence(test)
        torch.testing.assert_close(scores.double(), plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


class TestSources:
    def test_the_batch_size_is_not_part_of_the_key(self, planted, tmp_path):
        model, train, _ = planted
        stored(model, train, tmp_path).fit()
        with Counting(model) as counted:
            STRIDE(model, train, batch_size=17, feature_store=FeatureStore(tmp_path, chunk=CHUNK)).fit()
        assert counted.passes == 0

    def test_a_loader_of_dicts(self, tmp_path):
        model, test = built(HuggingFaceLike).eval(), ListOfDicts(5, seed=1)
        loader = DataLoader(ListOfDicts(20), batch_size=4)
        plain = STRIDE(model, loader)
        for _ in range(2):
            method = STRIDE(model, loader, feature_store=FeatureStore(tmp_path, chunk=CHUNK))
            inputs = DataLoader(test, batch_size=4)
            assert torch.equal(method.influence(inputs), plain.influence(inputs))

    def test_a_training_set_that_grew_or_shrank(self, planted, tmp_path):
        model, train, _ = planted
        x, y = train.tensors
        store = FeatureStore(tmp_path, chunk=CHUNK)
        method = STRIDE(model, train, batch_size=BATCH, feature_store=store).fit()
        key, taps = manifest(tmp_path)["key"], method._states[0].taps
        longer = [ExampleBatch((torch.cat([x, x[:1]]), torch.cat([y, y[:1]])), Reading())]
        shorter = [ExampleBatch((x[:40], y[:40]), Reading())]
        with pytest.raises(ValueError, match=f"more than {len(x)} examples"):
            store.fill(key, taps, longer, None)
        with pytest.raises(ValueError, match=r"others among examples|40 examples, not 48"):
            store.fill(key, taps, shorter, None)


def test_the_checksums_are_crc32_of_the_bytes(planted, tmp_path):
    model, train, _ = planted
    stored(model, train, tmp_path).fit()
    found = StoreFiles(tmp_path).read_manifest()
    content = (tmp_path / "features.bin").read_bytes()
    size = found.chunk_rows * found.parts["features"].row_bytes
    assert [c.checksums["features"] for c in found.chunks] == [
        zlib.crc32(content[start : start + size]) for start in range(0, len(content), size)
    ]
    assert FeatureStore(tmp_path).disk_bytes == sum(os.path.getsize(f) for f in tmp_path.iterdir())
