"""Devices: all methods on a device of their own, what they wait for, precision, copies in the background."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat_options import arguments
from method_calls import CALLS, METHODS, TRAINED, Make, assert_same_answers, every_call, operators, stride
from planted import MLP, BatchNormCNN, planted_classes, trained
from strict_device import DEVICE, StrictDevice, strict_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE, Batch, Checkpoint, ClosedForm, RandomSubsets, Ridge, Trained, reliability
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    ConfidentLearning,
    LossDetector,
    Random,
    Similarity,
    TracIn,
)
from stride_captum.conformance import laws_of, run_check, shipped, shipped_at_positions
from stride_captum.conformance.toy_problems import posed_with
from stride_captum.evaluation import compare, load_task
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.influence.top_k import GroupSums, StreamedTopK
from stride_captum.recovery import alpha_max, choose_alpha, lasso, lasso_path, ridge, working_set
from stride_captum.recovery.design import Design
from stride_captum.steering.gradient import BatchGradient
from stride_captum.steering.operators import SteeringOperators
from stride_captum.steering.rows import ExampleRows
from stride_captum.steering.sampling import padded_unique
from stride_captum.steering.training import train_operators
from stride_captum.subsets import membership_from_indices, random_subsets
from stride_captum.system.devices import (
    as_float64,
    existing_device,
    float64_device,
    full_precision,
    tf32_products,
)
from stride_captum.system.to_device import to_device


@pytest.fixture(scope="module")
def expected() -> Callable[[str], dict[str, Any]]:
    """What a method answers on the processor, by call; an exception where it raises one."""
    found: dict[str, dict[str, Any]] = {}

    def answers(name: str) -> dict[str, Any]:
        if name not in found:
            model, train, test = trained(MLP)
            found[name] = every_call(METHODS[name](model, train), test.tensors)
        return found[name]

    return answers


def judged_by_halves(model: nn.Module, train: Any) -> ConfidentLearning:
    weights, halves = model.state_dict(), (range(0, 48, 2), range(1, 48, 2))
    kept = [Checkpoint({k: v.cpu() for k, v in weights.items()}, seen=half) for half in halves]
    return ConfidentLearning(model, train, checkpoints=kept)


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def moved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


@pytest.mark.filterwarnings("ignore:.*in no subset")
class TestEveryMethod:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", METHODS)
    def test_answers_as_on_the_processor(self, name: str, expected: Any) -> None:
        wanted = expected(name)
        model, train, test = trained(MLP)
        with strict_device():
            found = every_call(METHODS[name](moved(model), train), on(DEVICE, *test.tensors))
            assert_same_answers(found, wanted, DEVICE)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [name for name in METHODS if name != "EKFAC"])
    def test_answers_on_a_device_without_float64(self, name: str, expected: Any) -> None:
        wanted = expected(name)
        model, train, test = trained(MLP)
        with strict_device(float64=False):
            found = every_call(METHODS[name](moved(model), train), on(DEVICE, *test.tensors))
            assert_same_answers(found, wanted, DEVICE)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", METHODS)
    def test_the_default_device_of_the_caller_changes_nothing(self, name: str, expected: Any) -> None:
        wanted = expected(name)
        model, train, test = trained(MLP)
        with strict_device(), DEVICE:
            found = every_call(METHODS[name](moved(model), train), on(DEVICE, *test.tensors))
            assert_same_answers(found, wanted, DEVICE)

    @pytest.mark.slow
    @pytest.mark.parametrize("float64", [True, False])
    @pytest.mark.parametrize("kind", ["closed form", "trained"])
    def test_positions_with_weights_where_the_caller_has_a_default_device(
        self, kind: str, float64: bool
    ) -> None:
        with posed_with("positions"):
            model, train, test = trained(MLP)
        omega = torch.rand(train.tensors[1].shape, generator=torch.Generator().manual_seed(0))
        omega[5], omega[:, 1] = 0, 0
        by_subsets = Trained(subsets=RandomSubsets(12), iterations=5, recovery=Ridge())
        own = by_subsets if kind == "trained" else ClosedForm(form="rows")
        options: dict[str, Any] = {"operators": own, "batch": Batch(sample_weight=omega)}
        wanted = STRIDE(model, train, **options).influence(test.tensors, per_position=True)
        with strict_device(float64=float64), DEVICE:
            method = STRIDE(moved(model), train, **options)
            found = method.influence(on(DEVICE, *test.tensors), per_position=True)
            assert found.device == DEVICE
            torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["cross_entropy", "positions"])
    def test_changes_and_reliability_where_the_caller_has_a_default_device(self, kind: str) -> None:
        with posed_with(kind):
            model, train, test = trained(MLP)

        def answers(method: STRIDE, points: Any) -> list[Tensor]:
            found = [reliability(method, points)]
            method.remove_examples([1, 4])
            method.add_examples(TensorDataset(*train[:3]))
            return [*found, method.influence(points)]

        wanted = answers(STRIDE(model, train).fit(), test.tensors)
        with strict_device(), DEVICE:
            found = [a.cpu() for a in answers(STRIDE(moved(model), train).fit(), on(DEVICE, *test.tensors))]
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", METHODS)
    def test_autocast_of_the_caller_changes_nothing(self, name: str, expected: Any) -> None:
        model, train, test = trained(MLP)
        method = METHODS[name](model, train)
        with torch.autocast("cpu", torch.bfloat16):
            scores = method.influence(test.tensors)
        assert torch.equal(scores, expected(name)["influence"])

    @pytest.mark.parametrize("name", ["DiagonalEKFAC", "operators, ridge", "STRIDE, random projection"])
    def test_the_default_dtype_of_the_caller_changes_nothing(self, name: str, expected: Any) -> None:
        model, train, test = trained(MLP)
        try:
            torch.set_default_dtype(torch.float64)
            scores = METHODS[name](model, train).influence(test.tensors)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(scores, expected(name)["influence"])

    @pytest.mark.matrix
    @pytest.mark.parametrize("name", ["STRIDE", "TracIn", "EKFAC", "STRIDE by rows, positions"])
    def test_laws(self, name: str) -> None:
        (subject,) = (s for s in (*shipped(), *shipped_at_positions()) if s.name == name)
        build = partial(subject.build, device=DEVICE)
        laws = dict(laws_of(subject.loss))
        del laws["float64_models_give_float64_scores"]  # the strict device has no products of two vectors
        with strict_device():
            outcomes = {
                law: run_check(function, build, subject.exceptions.get(law), subject.loss)
                for law, function in laws.items()
            }
        assert not {law: said for law, said in outcomes.items() if said.startswith(("fail", "needless"))}

    def test_ekfac_refuses_a_device_without_float64(self) -> None:
        model, train, _ = trained(MLP)
        with (
            strict_device(float64=False),
            pytest.raises(ValueError, match="`device` must have float64, which kronfluence computes with"),
        ):
            EKFAC(moved(model), train)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [LossDetector, ConfidentLearning, judged_by_halves])
    @pytest.mark.parametrize("float64", [True, False])
    def test_detectors_of_label_noise(self, kind: Any, float64: bool) -> None:
        model, train, _ = trained(MLP)
        wanted = kind(model, train).mislabel_scores()
        with strict_device(float64):
            found = kind(moved(model), train).mislabel_scores().cpu()
        torch.testing.assert_close(found, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kind(model, train).mislabel_scores(), wanted)


class TestData:
    """Where the examples are, and in which form the labels come."""

    def test_a_training_set_on_the_device(self) -> None:
        model, train, test = trained(MLP)
        wanted = STRIDE(model, train).influence(test.tensors)
        with strict_device():
            method = STRIDE(moved(model), TensorDataset(*on(DEVICE, *train.tensors)))
            torch.testing.assert_close(method.influence(test.tensors).cpu(), wanted)

    def test_a_model_of_the_processor_for_work_on_the_device(self) -> None:
        model, train, test = trained(BatchNormCNN)
        wanted = STRIDE(model, train).influence(test.tensors)
        with strict_device():
            method = STRIDE(model, train, device="lazy")
            assert method.device == DEVICE
            torch.testing.assert_close(method.influence(test.tensors).cpu(), wanted)
            assert {p.device.type for p in model.parameters()} == {"cpu"}

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [list, np.asarray])
    @pytest.mark.parametrize("build", [STRIDE, Similarity, Random, TracIn])
    def test_labels_that_are_no_tensor(self, kind: Any, build: Any) -> None:
        model, train, test = trained(MLP)
        x, y = test.tensors
        wanted = build(model, train).influence((x, y))

        def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
            return torch.stack([item[0] for item in items]), kind([int(item[1]) for item in items])

        loader = DataLoader(train, batch_size=16, collate_fn=collate)
        with strict_device():
            found = build(moved(model), loader).influence((x.to(DEVICE), kind(y.tolist()))).cpu()
        torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("build", [STRIDE, Similarity, TRAK])
    def test_a_model_that_was_moved_after_the_fit_is_refused(self, build: Any) -> None:
        model, train, test = trained(MLP)
        with strict_device():
            network = copy.deepcopy(model)
            method = build(network, train).fit()
            network.to(DEVICE)
            with pytest.raises(
                ValueError, match="`model` must be on cpu, as it was when the method was fitted"
            ):
                method.influence(test.tensors)
            network.to("cpu")
            torch.testing.assert_close(
                method.influence(test.tensors), build(model, train).influence(test.tensors)
            )

    def test_weights_on_two_devices_are_refused_unless_a_copy_goes_to_one(self) -> None:
        model, train, test = trained(MLP)
        wanted = STRIDE(model, train).influence(test.tensors)
        with strict_device():
            network = copy.deepcopy(model)
            network.fc2.to(DEVICE)
            with pytest.raises(
                ValueError, match="must have all its weights on one device; got weights on cpu"
            ):
                STRIDE(network, train)
            found = STRIDE(network, train, device=DEVICE).influence(test.tensors).cpu()
        torch.testing.assert_close(found, wanted)

    def test_weights_that_are_not_there_are_refused(self) -> None:
        model, train, _ = trained(MLP)
        network = copy.deepcopy(model)
        network.fc2.to("meta")
        with pytest.raises(ValueError, match=r"must hold its weights; got 'fc2.weight' on the meta device"):
            STRIDE(network, train)

    @pytest.mark.slow
    @pytest.mark.parametrize("float64", [True, False])
    @pytest.mark.parametrize("build", [STRIDE, TRAK, stride(curvature="eigenvalue-corrected")])
    def test_a_saved_method_is_loaded_on_either_device(
        self, build: Any, float64: bool, tmp_path: Path
    ) -> None:
        model, train, test = trained(MLP)
        wanted = build(model, train).influence(test.tensors)
        with strict_device(float64):
            network = moved(model)
            method = build(network, train).fit()
            method.save(tmp_path / "method")
            for place, points in ((network, on(DEVICE, *test.tensors)), (model, test.tensors)):
                found = type(method).load(tmp_path / "method", place, train).influence(points)
                assert found.device == points[0].device
                torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

    @pytest.mark.slow
    def test_stored_features_are_copied_in_blocks(self, tmp_path: Path) -> None:
        model, train, test = trained(MLP)
        reference = STRIDE(model, train).fit()
        with strict_device():
            method = STRIDE(moved(model), train, feature_store=tmp_path / "store")
            for change in (
                lambda m: m.fit(),
                lambda m: m.remove_examples([0, 7]),
                lambda m: m.add_examples(tuple(part[:3] for part in train.tensors)),
            ):
                wanted = change(reference).influence(test.tensors)
                found = change(method).influence(test.tensors).cpu()
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert method._states is not None


class TestWaits:
    """What a GPU would be waited for does not grow with the batches, blocks and steps of the work."""

    def waits(self, run: Callable[[], Any], device: StrictDevice) -> int:
        device.waits.clear()
        run()
        return device.waits.total()

    def test_batches_of_a_fit(self) -> None:
        model, train, _ = trained(MLP)
        with strict_device() as device:
            few, many = (
                self.waits(STRIDE(moved(model), train, batch_size=size).fit, device) for size in (48, 6)
            )
        assert many == few

    @pytest.mark.slow
    @pytest.mark.parametrize("curvature", ["kronecker", "eigenvalue-corrected"])
    def test_blocks_of_a_fit(self, curvature: Any) -> None:
        model, train, _ = trained(MLP)
        with strict_device() as device:
            counts, sizes = [], []
            for budget in ("256MiB", 2_000):
                config = arguments(memory_budget=budget, curvature=curvature)
                method = STRIDE(moved(model), train, **config)
                counts.append(self.waits(method.fit, device))
                sizes += [state.operators.block_rows for state in method._states or []]
        assert sizes[0] > 48 >= 8 * sizes[1]
        assert counts[1] == counts[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("call", ["influence", "top-k", "subset influence", "cosine"])
    def test_blocks_of_a_query(self, call: str) -> None:
        model, train, test = trained(MLP)
        with strict_device() as device:
            points = on(DEVICE, *test.tensors)
            counts = []
            for budget in ("256MiB", 16 * 7 * 10):
                method = STRIDE(moved(model), train, memory_budget=budget).fit()
                blocks = list(method._column_blocks(budget // 112 if isinstance(budget, int) else 48))
                counts.append(self.waits(lambda: CALLS[call](method, points), device))  # noqa: B023
        assert len(blocks) > 4
        assert counts[1] <= counts[0]

    @pytest.mark.slow
    def test_parameters_and_buffers(self) -> None:
        train = planted_classes(24, (2, 6, 6))

        def network(n: int) -> nn.Module:
            layers = [nn.BatchNorm2d(2) for _ in range(n)]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3)).eval()

        counts = []
        with strict_device() as device:
            for n in (1, 6):
                method = STRIDE(moved(network(n)), train).fit()
                counts.append(self.waits(lambda: method.influence(train[:3]), device))  # noqa: B023
        assert counts[1] == counts[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"linearity_weight": 0.1}, {"linearity": "example"}])
    def test_steps_of_a_training(self, options: dict[str, Any]) -> None:
        data = torch.Generator().manual_seed(0)
        x = torch.randn(60, 5, generator=data)
        z, y = torch.randn(60, 3, generator=data), torch.randint(3, (60,), generator=data)
        with strict_device() as device:
            counts = []
            for steps in (16, 48):
                chosen = {**TRAINED, "iterations": steps, "linearity_weight": 0.1, **options}
                config = arguments(**chosen)["operators"]
                counts.append(
                    self.waits(
                        lambda: train_operators(*on(DEVICE, x, z, y), random_subsets(60, 8, 6), config),  # noqa: B023
                        device,
                    )
                )
        assert counts[1] - counts[0] <= 2  # once for sixteen steps

    def test_steps_of_the_lasso(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(working_set, "_ROUND_STEPS", 40)
        subsets = random_subsets(40, 20, 15)
        y = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with strict_device() as device:
            columns, Y = Design(subsets, False, DEVICE), y.to(DEVICE)
            alpha, start, never = 0.02 * Y.new_ones(6), Y.new_zeros(6, columns.n_columns), Y.new_zeros(6)
            found: list[Any] = []
            waits = self.waits(
                lambda: found.extend(working_set._fista(columns, Y, alpha, start, never)), device
            )
            assert waits == 40 / working_set._CHECK_EVERY
            w, lipschitz, *_, exhausted = found
            assert exhausted
            rows = torch.ones(6, dtype=torch.bool, device=DEVICE)
            newton = self.waits(
                lambda: working_set._newton(columns, Y, alpha, w, lipschitz, rows, 1e-300), device
            )
            assert newton == working_set._NEWTON_STEPS


class TestRecovery:
    @pytest.mark.slow
    @pytest.mark.parametrize("float64", [True, False])
    @pytest.mark.parametrize("size", [4, 15])
    def test_every_function_on_the_device(self, float64: bool, size: int) -> None:
        subsets = random_subsets(40, 20, size)
        Y = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
        run: list[Callable[[Tensor], Tensor]] = [
            lambda y: alpha_max(y, subsets),
            lambda y: lasso(y, subsets, 0.3 * alpha_max(y, subsets), center=True).weights,
            lambda y: lasso(y, subsets, 0.3 * alpha_max(y, subsets)).duality_gap,
            lambda y: lasso_path(y, subsets, [0.5, 0.3])[1].weights,
            lambda y: ridge(y, subsets, 0.3, center=True),
            lambda y: ridge(y, subsets, torch.tensor([0.1, 0.2, 0.3, 0.4])),
            lambda y: choose_alpha(y, subsets, "aic", fractions=[0.9, 0.5]),
        ]
        for function in run:
            wanted = function(Y)
            with strict_device(float64):
                found = function(Y.to(DEVICE))
                place = DEVICE if float64 or found.dtype != torch.float64 else torch.device("cpu")
                assert found.device == place
                close = 1e-6 * float(wanted.abs().max())
                torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=max(close, 1e-9))


class TestStreams:
    def test_the_top_k_waits_for_nothing(self) -> None:
        scores = torch.randint(5, (3, 400), generator=torch.Generator().manual_seed(0)).float()
        wanted = StreamedTopK(7, largest=True)
        wanted.update(scores, 0)
        with strict_device() as device:
            best, on_device = StreamedTopK(7, largest=True), scores.to(DEVICE)
            for start in range(0, 400, 90):
                best.update(on_device[:, start : start + 90], start)
            found = best.result()
            assert not device.waits
            assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted.result(), strict=True))

    def test_sums_of_groups_wait_for_nothing(self) -> None:
        scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
        scores[1, 7] = torch.nan
        groups = membership_from_indices([[0, 1, 39], [], [7, 8]], 40)
        with strict_device() as device:
            sums, on_device = GroupSums(groups), scores.to(DEVICE)
            for start in range(0, 40, 15):
                sums.update(on_device[:, start : start + 15], start)
            (found,) = sums.result()
            assert not device.waits
            wanted = torch.stack([scores[:, [0, 1, 39]].sum(1), torch.zeros(3), scores[:, 7:9].sum(1)], 1)
            torch.testing.assert_close(found.cpu(), wanted, equal_nan=True)


class TestBatches:
    def test_padded_unique_is_unique(self) -> None:
        values = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(0))
        distinct, places = padded_unique(values)
        wanted, inverse = torch.unique(values, return_inverse=True)
        assert torch.equal(distinct[: len(wanted)], wanted)
        assert torch.equal(places, inverse)
        assert len(distinct) == values.numel()

    @pytest.mark.slow
    def test_batches_that_are_drawn_ahead_are_those_of_the_processor(self) -> None:
        subsets = random_subsets(50, 6, 9)
        data = torch.randn(50, 4), torch.randn(50, 3), torch.zeros(50, dtype=torch.int64)
        options = Trained(batch_size=5)

        def batches(device: torch.device) -> list[Tensor]:
            phi = SteeringOperators(4, 3, 6, 4).to(device)
            rows = ExampleRows(*on(device, *data))
            gradient = BatchGradient(phi, rows, subsets, options, 3, 4_000)
            assert len(gradient.blocks) > 1
            steps = [batch for _ in range(40) for batch in gradient.batches.step()]
            return [part.cpu() for batch in steps for part in vars(batch).values() if part is not None]

        wanted = batches(torch.device("cpu"))
        with strict_device():
            found = batches(DEVICE)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class TestPlaces:
    def test_float64_work_goes_where_float64_is(self) -> None:
        with strict_device():
            assert float64_device(DEVICE) == DEVICE
            assert as_float64(torch.ones(2, device=DEVICE)).device == DEVICE
        with strict_device(float64=False):
            assert float64_device(DEVICE) == torch.device("cpu")
            assert as_float64(torch.ones(2, device=DEVICE)).tolist() == [1.0, 1.0]

    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="`device` must be a device that torch can use here; got 'lazy'"):
            existing_device("lazy")
        with strict_device():
            assert existing_device("lazy") == DEVICE

    def test_the_meta_device_has_no_numbers(self) -> None:
        with pytest.raises(ValueError, match="`device` must be a device that torch can use here; got 'meta'"):
            existing_device("meta")

    def test_rows_may_be_written_to_while_they_are_copied(self) -> None:
        rows = torch.ones(2, 3)
        with strict_device():
            copied = to_device(rows, DEVICE, torch.float32)
            assert not isinstance(copied._numbers, Tensor)  # the copy is still under way
            rows.fill_(7.0)
            assert copied.tolist() == torch.ones(2, 3).tolist()
            # This is what the device makes of a buffer that is used again too early.
            buffer = torch.ones(2).pin_memory()
            late = buffer.to(DEVICE, non_blocking=True)
            buffer.fill_(7.0)
            assert late.tolist() == [7.0, 7.0]


def settings() -> dict[str, Any]:
    """All that torch says of the precision of products; "refused" where it does not tell."""
    cuda, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    read: dict[str, Callable[[], Any]] = {
        "matmul": torch.get_float32_matmul_precision,
        "cuda": lambda: cuda.allow_tf32,
        "cudnn": lambda: cudnn.allow_tf32,
        "products on CUDA": lambda: cuda.fp32_precision,
        "convolutions": lambda: cudnn.conv.fp32_precision,
        "recurrences": lambda: cudnn.rnn.fp32_precision,
        "products on the processor": lambda: mkldnn.matmul.fp32_precision,
        "convolutions on the processor": lambda: mkldnn.conv.fp32_precision,
    }
    found = {}
    for name, one in read.items():
        try:
            found[name] = one()
        except (RuntimeError, AttributeError):
            found[name] = "refused"
    return found


REDUCED = {"tf32", "bf16", "high", "medium", True}


@pytest.fixture
def restored() -> Iterator[None]:
    """The settings of the process, put back by torch itself."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
        for library in (torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn):
            for kind in ("matmul", "conv", "rnn"):
                if hasattr(getattr(library, kind, None), "fp32_precision"):
                    getattr(library, kind).fp32_precision = "none"
            if hasattr(library, "fp32_precision"):
                library.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def _set(path: str, value: Any) -> Callable[[], None]:
    *owners, name = path.split(".")

    def change() -> None:
        holder: Any = torch.backends
        for owner in owners:
            holder = getattr(holder, owner)
        if not hasattr(type(holder), name) and not hasattr(holder, name):
            pytest.skip("this version of torch has no such setting")
        setattr(holder, name, value)

    return change


CALLERS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _set("cuda.matmul.allow_tf32", True),
    "no convolutions": _set("cudnn.allow_tf32", False),
    "products": _set("cuda.matmul.fp32_precision", "tf32"),
    "convolutions": _set("cudnn.conv.fp32_precision", "ieee"),
    "everything": _set("fp32_precision", "tf32"),
    "bfloat16 on the processor": _set("mkldnn.matmul.fp32_precision", "bf16"),
}


@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore:Please use the new API")
class TestFullPrecision:
    device = torch.device("cuda", 0)

    @pytest.mark.parametrize("caller", CALLERS)
    def test_inside_it_is_full_and_afterwards_as_before(self, caller: str) -> None:
        CALLERS[caller]()
        before = settings()
        with full_precision(self.device):
            assert not REDUCED & set(settings().values()), settings()
            with full_precision(torch.device("cpu")):
                pass
            assert not REDUCED & set(settings().values()), settings()
            assert "matmul" not in [name for name, value in settings().items() if value == "refused"]
        assert settings() == before

    @pytest.mark.parametrize("caller", CALLERS)
    def test_an_exception_changes_nothing(self, caller: str) -> None:
        CALLERS[caller]()
        before = settings()
        with pytest.raises(KeyError), full_precision(self.device), tf32_products():
            raise KeyError
        assert settings() == before

    @pytest.mark.parametrize("caller", CALLERS)
    def test_tf32_for_a_part_of_it(self, caller: str) -> None:
        CALLERS[caller]()
        before = settings()
        with full_precision(self.device):
            with tf32_products():
                assert settings()["matmul"] == "high"
                assert settings()["cuda"] is True
            assert not REDUCED & set(settings().values())
        with tf32_products():
            assert settings()["cuda"] is True
        assert settings() == before

    def test_threads_that_overlap(self) -> None:
        """The second thread is not left with the setting of the caller, nor the caller with ours."""
        torch.set_float32_matmul_precision("high")
        before = settings()
        entered, leave, seen = threading.Event(), threading.Event(), []

        def second() -> None:
            with full_precision(self.device):
                entered.set()
                leave.wait(10)
                seen.append(settings())

        with full_precision(self.device):
            thread = threading.Thread(target=second)
            thread.start()
            assert entered.wait(10)
        leave.set()
        thread.join()
        assert not REDUCED & set(seen[0].values())
        assert settings() == before

    @pytest.mark.filterwarnings("ignore:.*in no subset")
    @pytest.mark.parametrize("make", [STRIDE, operators(precision="tf32", recovery="ridge")])
    def test_a_method_leaves_the_settings_alone(self, make: Make) -> None:
        model, train, test = trained(MLP)
        torch.set_float32_matmul_precision("medium")
        before = settings()
        make(model, train).influence(test.tensors)
        assert settings() == before

    def test_autocast_is_off_inside_and_may_be_turned_on_again(self) -> None:
        x = torch.ones(2, 2)
        with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert (x @ x).dtype == torch.bfloat16


class TestTheStrictDevice:
    """The test double refuses what it should: otherwise the tests above could not fail."""

    def test_it_refuses_what_a_gpu_refuses(self) -> None:
        with strict_device():
            x = torch.ones(3, device=DEVICE)
            refused: list[Callable[[], Any]] = [
                lambda: x + torch.ones(3),
                lambda: torch.ones(3) + x.sum(),
                lambda: torch.ones(3).add_(x.sum()),
                lambda: torch.cat([x, torch.ones(1)]),
                lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
                lambda: torch.ones(3)[torch.tensor([0], device=DEVICE)],
                lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()),
                lambda: x.normal_(generator=torch.Generator()),
                lambda: x.to("cpu", non_blocking=True),
            ]
            for operation in refused:
                with pytest.raises(RuntimeError, match=r"device|generator|non_blocking"):
                    operation()
            for operation in (x.numpy, lambda: np.asarray(x)):
                with pytest.raises(TypeError, match="numpy"):
                    operation()

    def test_it_allows_what_torch_allows(self) -> None:
        with strict_device():
            x = torch.arange(3.0, device=DEVICE)
            assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3]
            assert x[torch.tensor([2, 0])].tolist() == [2, 0]
            assert torch.where(x > 1, x, torch.tensor(9.0)).tolist() == [9, 9, 2]
            assert torch.ones(3).copy_(x).tolist() == [0, 1, 2]

    def test_it_refuses_float64_also_on_the_way_out(self) -> None:
        with strict_device(float64=False):
            x = torch.ones(3, device=DEVICE)
            for operation in (
                x.double,
                lambda: x.sum(dtype=torch.float64),
                lambda: x.to("cpu", torch.float64),
                lambda: torch.ones(3, dtype=torch.float64).copy_(x),
                lambda: torch.ones(3, dtype=torch.float64).to(DEVICE),
            ):
                with pytest.raises(TypeError, match="float64"):
                    operation()
            assert torch.ones(3, dtype=torch.float64).to(DEVICE, torch.float32).device == DEVICE

    def test_it_counts_what_the_host_waits_for(self) -> None:
        with strict_device() as device:
            x = torch.arange(4.0, device=DEVICE)
            for n, read in enumerate(
                (
                    lambda: x.sum().item(),
                    x.tolist,
                    x.cpu,
                    lambda: bool(x.any()),
                    x.nonzero,
                    lambda: x[x > 1],
                    lambda: torch.unique(x),
                    lambda: torch.linalg.cholesky(torch.eye(2, device=DEVICE)),
                ),
                1,
            ):
                read()
                assert device.waits.total() == n
            (
                x[torch.tensor([0], device=DEVICE)],
                x.sort(),
                torch.linalg.cholesky_ex(torch.eye(2, device=DEVICE)),
            )
            assert device.waits.total() == n
            assert device.copies.total() == 1  # of the index above


class TestComparison:
    @pytest.mark.slow
    def test_models_are_trained_and_methods_run_on_the_device(self, tmp_path: Path) -> None:
        training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=3)
        task = load_task("synthetic", preset="smoke", training=training)
        measures = {
            "lds": {},
            "calibration": {},
            "counterfactual": {"counts": (20,), "n_points": 2, "n_seeds": 1},
            "mislabel": {"n_held_out": 20, "detectors": ("loss",)},
            "leakage": {"counts": (4,)},
        }
        sizes = {"n_subsets": 6, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1, "n_resamples": 20}
        methods = ["STRIDE", "TracIn", "Similarity", "ClassRandom"]

        def run(device: torch.device, store: Path) -> Any:
            return compare(methods, task, store=store, measures=measures, device=device, **sizes)

        wanted = run(torch.device("cpu"), tmp_path / "cpu")
        with strict_device() as device:
            found = run(DEVICE, tmp_path / "device")
        assert device.waits.total() > 0
        assert found.environment["device"] == str(DEVICE)
        for a, b in zip(found.rows, wanted.rows, strict=True):
            assert a.lds.value == pytest.approx(b.lds.value, abs=0.02)
        for part in ("counterfactual", "mislabel", "leakage"):
            assert [row.name for row in getattr(found, part)] == [row.name for row in getattr(wanted, part)]
        for a, b in zip(found.mislabel, wanted.mislabel, strict=True):
            assert a.result.precision == pytest.approx(b.result.precision, abs=0.05)
