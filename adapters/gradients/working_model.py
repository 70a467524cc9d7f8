"""Base class of methods that work on a copy of the model if its own tensors are unsuitable for gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...data.batch import ExampleBatch
from ...influence.method import InfluenceMethod
from ...system.fingerprints import weights_fingerprint, weights_version
from .checks import probe_of
from .traces import attributes_put_back
from .working_copies import check_copy, needs_copy, wide_copy, widened


class OnWorkingCopy(InfluenceMethod):
    """A method that takes gradients in float32 or wider, of the model or of a copy.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        **options: Those of `InfluenceMethod`.
    """

    def __init__(self, model: nn.Module, train_dataset: Any, **options: Any) -> None:
        super().__init__(model, train_dataset, **options)
        self._wide_copy: tuple[Any, nn.Module] | None = None

    def _model_on_device(self) -> nn.Module:
        """The model, or a float32 copy if its own tensors are unsuitable for gradients."""
        model = super()._model_on_device()
        if not needs_copy(model):
            return model
        version = weights_version(model)
        if self._wide_copy is None or self._wide_copy[0] != version:
            self._wide_copy = version, wide_copy(model)
        return self._wide_copy[1]

    def _check_model(self, model: nn.Module) -> None:
        if self._wide_copy is not None and model is self._wide_copy[1]:
            check_copy(self.model, model, probe_of(self._first_train_batch()))
        super()._check_model(model)

    @contextmanager
    def _session(self) -> Iterator[nn.Module]:
        with super()._session() as model, attributes_put_back(model):
            yield model

    def _check_unchanged(self) -> None:
        if self._fitted_on is not None and self.checkpoints is None and needs_copy(self.model):
            # What was fitted is the copy, so that is what has the fingerprint.
            known, fingerprint, device = self._fitted_on
            version = weights_version(self.model)
            if version != known and weights_fingerprint(self._model_on_device()) == fingerprint:
                self._fitted_on = version, fingerprint, device
        super()._check_unchanged()

    def _batches(self, source: Any, argument: str, show_progress: bool, what: str) -> Iterator[ExampleBatch]:
        for batch in super()._batches(source, argument, show_progress, what):
            if len(batch):
                yield batch

    def _as_logits(self, outputs: Tensor, batch: ExampleBatch) -> Tensor:
        return widened(super()._as_logits(outputs, batch))
