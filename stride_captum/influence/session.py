"""Work with the model: device, checkpoints, and restoration of its state."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from captum.influence import DataInfluence
from torch import nn

from ..errors import bad_type, bad_value
from ..system.devices import check_placed, device_of, existing_device, full_precision
from ..system.fingerprints import weights_fingerprint, weights_sums, weights_version
from ..system.locks import exclusive
from ..system.memory import parse_bytes
from ..system.preserve_state import preserve_state
from .checkpoints.checkpoint import LoadCheckpoint, apart_from, checkpoint_list, named, weights_of
from .checkpoints.load_functions import load_with


class ModelSession(DataInfluence):  # type: ignore[misc]
    """The part of every method that works with the model.

    Args:
        model: The network.
        device: Where the work is done; None takes the device of the model.
        checkpoints: State dicts or paths, or a folder of them.
        checkpoints_load_func: `f(model, checkpoint)` loads one and returns a learning rate.
        memory_budget: Memory for one block of work.
    """

    #: Whether the method takes gradients of the network.
    needs_gradients: ClassVar[bool] = False

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """Refuse Captum's positional call, whose second argument is a layer, and show the right one."""
        if len(arguments) > 2:
            raise bad_type(
                "arguments",
                f"be {cls.__name__}(model, train_dataset, ...) with all others by name",
                arguments[2],
                f"Write {cls.__name__}(model, train_dataset, checkpoints=[...], "
                "checkpoints_load_func=..., layers=[...]) where Captum has "
                "TracInCPFast(model, layer, train_dataset, checkpoints).",
            )
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None,
        checkpoints: Iterable[Any] | str | Path | None,
        checkpoints_load_func: LoadCheckpoint,
        memory_budget: int | str,
    ) -> None:
        # Captum's own constructor is misspelled and cannot be called.
        self.model = model
        check_placed(model, device is None)
        self.device = None if device is None else existing_device(device)
        self.checkpoints = None if checkpoints is None else apart_from(model, checkpoint_list(checkpoints))
        self.checkpoints_load_func = checkpoints_load_func
        self.memory_budget = parse_bytes(memory_budget, self._work_device())
        self._device_copy: tuple[Any, nn.Module] | None = None
        self._fitted_on: tuple[Any, str, torch.device] | None = None
        self._loaded_before: dict[int, tuple[int, ...]] = {}

    @contextmanager
    def _session(self) -> Iterator[nn.Module]:
        """Context manager: the model on the working device, in eval mode, locked and restored on exit."""
        with (
            exclusive(self, self.model),
            torch.inference_mode(False),  # first: a copy on a device must have weights with gradients
            preserve_state(self._model_on_device(), weights=self.checkpoints is not None) as model,
            torch.set_grad_enabled(self.needs_gradients),
            full_precision(self._work_device()),
        ):
            yield model

    def _model_on_device(self) -> nn.Module:
        """The model, or a copy on another device, which is refreshed when the weights have changed."""
        first = next(self.model.parameters(), None)
        if self.device is None or first is None or first.device == self.device:
            return self.model
        version = weights_version(self.model)
        if self._device_copy is None or self._device_copy[0] != version:
            self._device_copy = version, copy.deepcopy(self.model).to(self.device)
        return self._device_copy[1]

    def _work_device(self) -> torch.device:
        if self.device is not None:
            return self.device
        return device_of(self.model)

    def _checkpoints(self) -> Sequence[Any]:
        return [None] if self.checkpoints is None else self.checkpoints

    def _load(self, model: nn.Module, checkpoint: Any) -> float:
        if checkpoint is None:
            return 1.0
        rate = load_with(self.checkpoints_load_func, model, weights_of(checkpoint))
        model.eval()
        return rate

    def _load_fitted(self, model: nn.Module, checkpoint: Any) -> None:
        """Load a checkpoint that the method was fitted on.

        Raises:
            ValueError: It has other weights now, such as a file that a running training overwrites.
        """
        self._load(model, checkpoint)
        if checkpoint is None or self._fitted_on is None:
            return
        index = next(i for i, known in enumerate(self._checkpoints()) if known is checkpoint)
        sums = weights_sums(model)
        if self._loaded_before.get(index) == sums:
            return
        if weights_fingerprint(model) != self._fitted_on[1].split()[index]:
            raise bad_value(
                "checkpoints",
                "have the weights that the method was fitted on",
                f"other weights in {named(checkpoint)}",
                "Call fit() again, and keep files that nothing overwrites.",
            )
        self._loaded_before[index] = sums

    def _fingerprint(self) -> str:
        """Fingerprints of the weights of `model`, or of all checkpoints."""
        with self._session() as model:
            found = []
            for checkpoint in self._checkpoints():
                self._load(model, checkpoint)
                found.append(weights_fingerprint(model))
        return " ".join(found)

    def _mark_fitted(self, fingerprint: str) -> None:
        self._fitted_on = (weights_version(self.model), fingerprint, self._work_device())
        self._loaded_before = {}

    def _check_unchanged(self) -> None:
        if self._fitted_on is None:
            return
        version, fingerprint, device = self._fitted_on
        if self._work_device() != device:
            remedy = "Move it back, or call fit() again."
            must = f"be on {device}, as it was when the method was fitted"
            raise bad_value("model", must, str(self._work_device()), remedy)
        if self.checkpoints is not None:
            return
        now = weights_version(self.model)
        if now != version:
            if weights_fingerprint(self.model) != fingerprint:
                raise bad_value(
                    "model",
                    "have the weights that the method was fitted on",
                    "other weights",
                    "Call fit() again, or build a new object for the new model.",
                )
            self._fitted_on = (now, fingerprint, device)
