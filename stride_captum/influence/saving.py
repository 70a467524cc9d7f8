"""`save` and `load` of every method, its settings, and its `repr`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .fitting import FittedMethod
from .persistence import load_method, save_method

Self = TypeVar("Self", bound="SavedMethod")


class SavedMethod(FittedMethod):
    """The part of every method that saves and loads it."""

    layers: Sequence[str] | None
    compared_: str

    def __repr__(self) -> str:
        fitted = f"n_train={self.n_train_}" if self._states is not None else "not fitted"
        return f"{type(self).__name__}({', '.join([*self._said(), fitted])})"

    def _said(self) -> list[str]:
        """Options that `repr` shows."""
        common = {"layers", "batch_size", "loss"}
        return [f"{name}={value!r}" for name, value in self.settings().items() if name not in common]

    def save(self, path: str | Path) -> None:
        """Write what `fit` has learned to one safetensors file.

        Args:
            path: File name.

        Raises:
            ValueError: Nothing has been fitted, or `path` is a folder.
            OSError: The file cannot be written.
        """
        save_method(self, path)

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path,
        model: nn.Module,
        train_dataset: Any,
        *,
        changed: str = "refuse",
        **options: Any,
    ) -> Self:
        """Read a saved method, without a pass of the training set through the model.

        Labels of all training examples are compared with those of the fit, and inputs if they take at most
        `stale_data.INPUT_BYTES`; `compared_` says what was compared. This reads the data set, unless its
        labels are available alone and its inputs are larger than that.

        Args:
            path: File name.
            model: The model that it was fitted on.
            train_dataset: The training set that it was fitted on.
            changed: What to do if examples have changed: "refuse"; "update" the method with these examples
                (closed-form STRIDE; equals a refit); or "ignore", which compares only the length, for data
                that are slow to read and known to be the same.
            **options: Constructor arguments that are not saved (device, checkpoints, ...), or another
                batch_size.

        Raises:
            ValueError: The file is damaged, or belongs to other weights, other data or another class.
        """
        return load_method(cls, path, model, train_dataset, options, changed)

    def _states_to_save(self) -> list[Any]:
        """States of all checkpoints, as `save` writes them."""
        return list(self._states or [])

    def _loaded_states(self, states: list[Any], fingerprints: list[str]) -> list[Any]:
        """Inverse of `_states_to_save`; `fingerprints` are those of the checkpoints."""
        return states

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that `save` keeps, as plain values."""
        layers = None if self.layers is None else list(self.layers)
        return {"layers": layers, "batch_size": self.batch_size, "loss": self.loss}
