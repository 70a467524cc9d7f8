"""Saving and loading of fitted methods: what a file holds, and whether it fits the model and the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.digests import Digests
from ..data.reading import Batch
from ..errors import bad_choice, bad_value
from ..features.store import FeatureStore
from ..losses import loss_of
from ..system.random_states import draws_put_back, same_random_state
from ..system.saved_files import not_ours, read_file, write_file
from ..system.saved_values import decode, encode, saved_as
from .checkpoints.checkpoint import Checkpoint, seen_by, weights_of
from .stale_data import batch_layout, changed_data, check_length, compare, read_digests

if TYPE_CHECKING:
    from .saving import SavedMethod

Method = TypeVar("Method", bound="SavedMethod")
_DEFAULTS = ("response", "target", "normalize", "memory_budget")
_PARTS = (
    "class",
    "settings",
    "defaults",
    "weights",
    "batch",
    "batch_options",
    "checkpoint_weights",
    "states",
    "learned",
)
#: Attributes that say something of the object and nothing of what was learned.
_NOT_LEARNED = ("query_seconds_", "peak_bytes_", "compared_")


def save_method(method: SavedMethod, path: str | Path) -> None:
    """Write a fitted method atomically to one file (see `InfluenceMethod.save`)."""
    if method._states is None or method._fitted_on is None:
        raise bad_value("method", "be fitted before it is saved", "one that is not", "Call fit() first.")
    if Path(path).is_dir():
        raise bad_value("path", "name a file", f"the folder {str(path)!r}", "Add a name for the file.")
    tensors: dict[str, Tensor] = {}
    learned = {
        name: value
        for name, value in vars(method).items()
        if name.endswith("_") and not name.startswith("_") and name not in _NOT_LEARNED
    }
    if learned.get("digests_") is None:
        learned["digests_"] = _digests_now(method)
    description = {
        "class": type(method).__name__,
        "settings": encode(method.settings(), "settings", tensors),
        "defaults": encode({name: getattr(method, name) for name in _DEFAULTS}, "defaults", tensors),
        "weights": method._fitted_on[1],
        "batch": batch_layout(method),
        "batch_options": _said(method.batch),
        "checkpoint_weights": method._weights,
        "seen": encode([seen_by(c, method.n_train_) for c in method._checkpoints()], "seen", tensors),
        "states": encode(method._states_to_save(), "states", tensors),
        "learned": encode(learned, "learned", tensors),
    }
    write_file(path, description, tensors)


def _digests_now(method: SavedMethod) -> Digests:
    """Digests of a training set of which `fit` has kept none."""
    with draws_put_back():
        digests = read_digests(method)
    if len(digests) != method.n_train_ and not hasattr(method, "columns"):
        must = f"hold the {method.n_train_:,} examples that the method was fitted on"
        raise bad_value("train_dataset", must, f"{len(digests):,}", "Fit again.")
    return digests


def load_method(
    cls: type[Method],
    path: str | Path,
    model: nn.Module,
    train_dataset: Any,
    options: dict[str, Any],
    changed: str = "refuse",
) -> Method:
    """Read a fitted method (see `InfluenceMethod.load`)."""
    if changed not in ("refuse", "update", "ignore"):
        raise bad_choice("changed", changed, ["refuse", "update", "ignore"])
    description, tensors = read_file(path, _PARTS)
    if description["class"] != cls.__name__:
        got = f"{str(path)!r} with a {description['class']}"
        raise bad_value("path", f"hold a {cls.__name__}", got, f"Call {description['class']}.load.")
    settings, defaults = _decoded(path, description, tensors, ("settings", "defaults"))
    loss = settings.pop("loss")
    fitted = [name for name in options if name in settings and name not in ("batch_size", "feature_store")]
    if loss_of(options.get("loss", loss)) != loss:
        fitted.append("loss")
    if fitted:
        raise bad_value("options", "leave what has been fitted as it is", repr(fitted[0]), "Fit again.")
    if settings.get("feature_store"):
        settings["feature_store"] = FeatureStore(**settings["feature_store"])
    method = cls(model, train_dataset, **{**settings, **options})
    method.loss = loss
    if _said(method.batch) != description["batch_options"]:
        raise bad_value(
            "batch",
            f"be as for the saved method ({_shown(description['batch_options'])})",
            _shown(_said(method.batch)),
            "Pass the same batch=Batch(...).",
        )
    if method._fingerprint() != description["weights"]:
        raise bad_value(
            "model" if method.checkpoints is None else "checkpoints",
            "have the weights of the saved method",
            "other weights",
            "Pass the same `checkpoints`, if there were any, or fit again.",
        )
    for name, value in defaults.items():
        if name not in options:
            setattr(method, name, value)
    _restore(method, path, description, tensors, changed)
    return method


def _restore_seen(method: SavedMethod, saved: Sequence[Tensor | None]) -> None:
    """Let checkpoints know what they have seen; refuse those that say something else."""
    if method.checkpoints is None:
        return
    whole = []
    for checkpoint, seen in zip(method.checkpoints, saved, strict=True):
        given = seen_by(checkpoint, method.n_train_)
        if given is not None and (seen is None or not torch.equal(given, seen)):
            must = "have seen the examples that those of the saved method have seen"
            raise bad_value("checkpoints", must, "other examples", "Pass the same `seen`, or fit again.")
        whole.append(checkpoint if seen is None else Checkpoint(weights_of(checkpoint), seen=seen.tolist()))
    method.checkpoints = whole


def _said(batch: Batch) -> dict[str, Any]:
    """How batches are read, in plain values; of functions only that there is one."""
    options = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name: "a function" if callable(value) else None if value is None else _in_words(value)
        for name, value in options.items()
    }


def _in_words(value: Any) -> str:
    """An option in words; of weights number and sum, since they are compared with the examples."""
    if isinstance(value, Tensor):
        return f"{len(value)} weights of sum {float(value.sum())!r}"
    return repr(value)


def _shown(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in said.items() if value is not None) or "the default"


def _restore(
    method: SavedMethod,
    path: str | Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    changed: str,
) -> None:
    """Put back what was learned, after a look at the training set."""
    (learned,) = _decoded(path, description, tensors, ("learned",))
    saved = learned.get("digests_")
    if not isinstance(saved, Digests):
        raise not_ours(path, "has no digests of the training set")
    found = None
    if changed == "ignore":
        check_length(method, len(saved))
        method.compared_ = "nothing, as asked"
    else:
        found = compare(method, saved, description["batch"])
        method.compared_ = found.compared
        if len(found.rows) and (changed == "refuse" or not _can_update(method)):
            raise changed_data(method, saved, found, _remedy(method))
    (states,) = _decoded(path, description, tensors, ("states",), method._work_device())
    method._states = method._loaded_states(states, description["weights"].split())
    method._weights = description["checkpoint_weights"]
    method._mark_fitted(description["weights"])
    method._mark_data()
    for name, value in learned.items():
        setattr(method, name, value)
    if "seen" in description:
        _restore_seen(method, _decoded(path, description, tensors, ("seen",))[0])
    if found is not None and len(found.rows):
        method._read_again(found.rows)


def _decoded(
    path: str | Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    device: torch.device | str = "cpu",
) -> list[Any]:
    """Parts of the description as values."""
    try:
        with same_random_state():
            return [decode(description[name], tensors, torch.device(device)) for name in names]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise not_ours(path, "has a description that does not fit its tensors") from error


def _can_update(method: SavedMethod) -> bool:
    """Whether the method can take in examples that have changed."""
    check = getattr(method, "_check_changeable", None)
    try:
        return check is not None and check() is None and getattr(method, "feature_store", None) is None
    except ValueError:
        return False


def _remedy(method: SavedMethod) -> str:
    if getattr(method, "feature_store", None) is not None:
        return "Fit again, with another `feature_store`: this one holds the examples as they were."
    if _can_update(method):
        return "Fit again, or pass changed='update' to read only these and bring the method up to date."
    return "Fit again: this method cannot take in single examples."


__all__ = ["load_method", "save_method", "saved_as"]
