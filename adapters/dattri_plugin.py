"""Plugin for dattri: every method of this package as one of its attributors.

    from stride_captum.adapters.dattri_plugin import STRIDEAttributor, attributor_for

    attributor = STRIDEAttributor(task)
    attributor.cache(train_loader)
    scores = attributor.attribute(train_loader, test_loader)    # (n_train, n_test), as dattri's own
    dattri.metric.lds(scores, (values, indices))                # values are margins of retrained models

The response is the method's, by default the margin of the label, whatever loss and target the task has; a
positive score raises it. dattri's own scores are of minus the loss, and `calculate_lds_ground_truth` and
`calculate_loo_ground_truth` expect a target function that is lower for better: give it minus the margin.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..data import inputs as data
from ..errors import bad_type, bad_value
from ..influence.method import InfluenceMethod
from ..stride import STRIDE
from ..system.packages import install_command
from ..system.random_states import same_random_state

try:
    from dattri.algorithm.base import BaseAttributor
except ImportError as error:
    hint = f"The dattri plugin needs dattri: {install_command('dattri')} ({error})."
    raise ImportError(hint) from error


class InfluenceAttributor(BaseAttributor):  # type: ignore[misc]
    """A dattri attributor around a method; a subclass sets `method`, or `attributor_for` makes one.

    Scores are averaged over the checkpoints of the task, as dattri's are (a method may weigh them).

    Args:
        task: dattri's `AttributionTask`: the network, the checkpoints and how they are loaded.
        response: Other response (see `stride_captum.responses`); None takes the method's. With "loss" a
            positive score raises the loss, the other way round from dattri.
        **options: Those of the method: layers, device, config, ...

    Attributes:
        influence_method: The method that `cache` has fitted; None before.
    """

    @property
    @abstractmethod
    def method(self) -> type[InfluenceMethod]:
        """Class of the method."""

    def __init__(self, task: Any, *, response: str | None = None, **options: Any) -> None:
        self.task, self.response, self.options = task, response, options
        self.influence_method: InfluenceMethod | None = None

    def cache(self, full_train_dataloader: DataLoader[Any]) -> None:
        """Fit the method on all examples that the network was trained on, not shuffled."""
        dataset, order = self._cached = _examples(full_train_dataloader, "full_train_dataloader")
        source = full_train_dataloader
        if order != list(range(len(dataset))):  # column i of a method is the i-th example of its data set
            batches = source.batch_size or max(map(len, source.batch_sampler or [[0]]))
            source = DataLoader(
                Subset(dataset, order),
                batches,
                collate_fn=source.collate_fn,
                num_workers=source.num_workers,
            )
        self.influence_method = self.method(
            self.task.get_model(),
            source,
            checkpoints=self.task.get_checkpoints(),
            checkpoints_load_func=self._load,
            **self.options,
        ).fit()

    def attribute(self, train_dataloader: DataLoader[Any], test_dataloader: DataLoader[Any]) -> Tensor:
        """Influence of training examples on test points, also within `torch.no_grad()`.

        Args:
            train_dataloader: Some or all examples of the cached loader in any fixed order, by a sampler or
                by `Subset`s of the same data set.
            test_dataloader: Test points with labels, not shuffled.

        Returns:
            `(n_train, n_test)`, rows and columns in the order of the loaders.

        Raises:
            TypeError: Not a loader that makes batches of single examples.
            ValueError: A loader that shuffles, or training examples that were not cached.
        """
        method, rows = self._fitted(train_dataloader)
        scores = method.influence(test_dataloader, response=self.response)
        return scores[:, rows].T.contiguous()

    def self_attribute(self, train_dataloader: DataLoader[Any]) -> Tensor:
        """Self-influence of training examples, `(n_train,)` in the order of the loader."""
        method, rows = self._fitted(train_dataloader)
        return method.self_influence()[rows]

    def mislabel_scores(self, train_dataloader: DataLoader[Any]) -> Tensor:
        """How suspect each training label is, `(n_train,)`, for `dattri.metric.mislabel_detection_auc`."""
        method, rows = self._fitted(train_dataloader)
        return method.mislabel_scores()[rows]

    def _fitted(self, loader: DataLoader[Any]) -> tuple[InfluenceMethod, list[int]]:
        """The fitted method, and the places of a loader's examples in the training set."""
        if self.influence_method is None:
            warnings.warn("cache() was not called: train_dataloader is the training set.", stacklevel=3)
            self.cache(loader)
        dataset, order = _examples(loader, "train_dataloader")
        full, full_order = self._cached
        place = {example: row for row, example in enumerate(full_order)}
        if dataset is not full or not place.keys() >= set(order):
            remedy = "Build both loaders on the same data set object."
            raise bad_value("train_dataloader", "give examples that cache() has read", "others", remedy)
        assert self.influence_method is not None, "cache() fits it"
        return self.influence_method, [place[example] for example in order]

    def _load(self, model: nn.Module, checkpoint: Any) -> float:
        loaded = self.task.checkpoints_load_func(model, checkpoint)
        if isinstance(loaded, nn.Module) and loaded is not model:
            model.load_state_dict(loaded.state_dict())
        return 1.0


@functools.cache
def attributor_for(method: type[InfluenceMethod]) -> type[InfluenceAttributor]:
    """The attributor class of a subclass of `InfluenceMethod`, named after it; the same class every time."""
    if not (isinstance(method, type) and issubclass(method, InfluenceMethod)):
        raise bad_type("method", "be a subclass of InfluenceMethod", method, "Give the class, not an object.")
    contents = {"method": method, "__doc__": method.__doc__, "__module__": __name__}
    return type(f"{method.__name__}Attributor", (InfluenceAttributor,), contents)


def _examples(loader: Any, argument: str) -> tuple[Any, list[int]]:
    """The data set below all `Subset`s, and which of its examples a loader gives, in order."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        raise bad_type(argument, "be a DataLoader that makes the batches itself", loader)
    if isinstance(loader.dataset, IterableDataset):
        raise bad_type(argument, "be a DataLoader of a data set with indices", loader.dataset)
    data.check_source(loader, argument)
    with same_random_state():
        order = [int(i) for batch in loader.batch_sampler for i in batch]
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        order = [int(dataset.indices[i]) for i in order]
        dataset = dataset.dataset
    return dataset, order


STRIDEAttributor = attributor_for(STRIDE)
