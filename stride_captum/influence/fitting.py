"""`fit`: one state per checkpoint, with duration, peak memory and digests of the examples."""

from __future__ import annotations

import time
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..data import inputs as data
from ..data.digests import Digests
from ..errors import bad_type, bad_value
from ..losses import Loss
from ..system.fingerprints import weights_fingerprint
from ..system.locks import exclusive
from ..system.peak_memory import PeakMemory
from ..system.processes import SINGLE_PROCESS, SingleProcess
from .checkpoints.checkpoint import warn_of_equal
from .scoring import ScoringLoop

Self = TypeVar("Self", bound="FittedMethod")


class FittedMethod(ScoringLoop):
    """The part of every method that learns from the training set."""

    #: Whether `fit` reads the training set once (for each checkpoint), and queries never do.
    fits_in_one_pass: ClassVar[bool] = False
    #: The processes that share the training set.
    ranks: SingleProcess = SINGLE_PROCESS
    digests_: Digests | None
    _fitted_data: tuple[Any, Loss] | None = None  # what it has learned from
    _checkpoint_index: int  # of the checkpoint that is being fitted

    def fit(self: Self, show_progress: bool = False) -> Self:
        """Learn from the training set.

        Args:
            show_progress: Whether to show a bar over its batches.

        Returns:
            The method itself.
        """
        with exclusive(self):
            started = time.perf_counter()
            self._states = None
            passes = self._training_passes()
            with self._session() as model, PeakMemory(self._work_device()) as memory:
                passes.restart(not self.fits_in_one_pass or len(self._checkpoints()) > 1)
                states, rates, fingerprints = [], [], []
                try:
                    for index, checkpoint in enumerate(self._checkpoints()):
                        self._checkpoint_index = index
                        rates.append(self._load(model, checkpoint))
                        fingerprints.append(weights_fingerprint(model))
                        states.append(self._fit_one(model, show_progress))
                finally:
                    passes.release()
            if data.count_examples(self.train_dataset) is None:  # it was not known before
                self.batch.check_weights_of(self.n_train_)
            warn_of_equal(self._checkpoints(), fingerprints)
            self._states, self._weights = states, self.combine_weights(rates)
            self._mark_fitted(" ".join(fingerprints))
            self._mark_data()
            self.digests_ = passes.digests
            self.fit_seconds_, self._fit_bytes = time.perf_counter() - started, memory.bytes
            self.peak_bytes_ = memory.bytes
        return self

    def _fit_one(self, model: nn.Module, show_progress: bool) -> Any:
        """`fit_checkpoint`, with checks of the model and of its outputs for the training set."""
        self._check_model(model)
        self._take_positions_together(model)
        self._output_check = self.loss.output_check(model)
        try:
            state = self.fit_checkpoint(model, show_progress)
            self._output_check.finish()
        finally:
            self._output_check = None
        return state

    def _mark_data(self) -> None:
        """Remember what the method has learned from."""
        self._fitted_data = self.train_dataset, self.loss

    def _check_unchanged(self) -> None:
        super()._check_unchanged()
        if self._fitted_data is None:
            return
        train_dataset, loss = self._fitted_data
        if train_dataset is not self.train_dataset:
            must, got = "be the data set that the method was fitted on", self.train_dataset
            raise bad_type("train_dataset", must, got, "Call fit() again, or build a new object.")
        if loss != self.loss:
            must, got = f"be {loss.name!r} as it was when the method was fitted", repr(self.loss)
            raise bad_value("loss", must, got, "Call fit() again, or build a new object.")
