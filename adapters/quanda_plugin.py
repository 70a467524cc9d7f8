"""Plugin for quanda: every method of this package as one of its explainers.

    from stride_captum.adapters.quanda_plugin import STRIDEExplainer, explainer_for

    metric = ModelRandomizationMetric(..., explainer_cls=STRIDEExplainer, expl_kwargs={"layers": ["fc1"]})
    similarity = explainer_for(Similarity)

What is explained is the method's own response, by default the margin of the class in `targets`; a positive
score raises it. quanda also builds explainers of copies of the model with other weights: name layers.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import bad_type, bad_value
from ..influence.method import InfluenceMethod
from ..stride import STRIDE
from ..system.packages import install_command

try:
    from quanda.explainers import Explainer
    from quanda.utils.datasets.dataset_handlers import HuggingFaceDatasetHandler, get_dataset_handler
except ImportError as error:
    hint = f"The quanda plugin needs quanda: {install_command('quanda')} ({error})."
    raise ImportError(hint) from error

#: Distance of neighboring ranks. quanda adds `1e-4 * index` to the scores it sorts, which would put scores
#: that are closer than that in the order of the data set; ten million indices fit between two ranks.
_RANK_STEP = 1e3


class InfluenceExplainer(Explainer):  # type: ignore[misc]
    """A quanda explainer around a method; a subclass sets `method`, or `explainer_for` makes one.

    The last checkpoint is loaded into a copy of the model, which is evaluated in eval mode: the model that
    quanda passes is left as it was, and what happens to it or to the file later changes nothing.

    Args:
        model: The network, as quanda passes it.
        train_dataset: A torch data set of `(input, label)` or of dicts with "labels", or a Hugging Face
            data set with "labels".
        checkpoints: Path or list of paths; none explains `model` as it is.
        checkpoints_load_func: `f(model, path)`; None takes quanda's, which loads a state dict.
        model_id: Quanda's name of the model. Nothing is kept on disk, so that it changes nothing.
        task: Quanda's name of the task; must be in `accepted_tasks`.
        every_checkpoint: Give the method all checkpoints, as TracIn wants, instead of the last one.
        **options: Those of the method: layers, batch_size, config, ...

    Attributes:
        influence_method: The method; fitted on first use.
    """

    accepted_tasks: ClassVar[list[str]] = ["image_classification", "text_classification"]

    @property
    @abstractmethod
    def method(self) -> type[InfluenceMethod]:
        """Class of the method."""

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Any = None,
        model_id: str = "",
        task: str = "image_classification",
        every_checkpoint: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model=copy.deepcopy(model),
            train_dataset=train_dataset,
            task=task,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
        )
        self.model_id = model_id
        self.load_last_checkpoint()
        self.model.eval()
        if every_checkpoint:
            options.update(checkpoints=self.checkpoints, checkpoints_load_func=self.checkpoints_load_func)
        # Not self.train_dataset, which reads even tensors example by example.
        source = _source(train_dataset, options.get("batch_size", 32))
        self.influence_method = self.method(self.model, source, **options)

    def explain(
        self, test_data: Tensor | Mapping[str, Tensor], targets: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Influence of every training example on each test point.

        Args:
            test_data: Inputs of the network, a tensor or a dict.
            targets: Class of the response for each test point; None takes the predicted one.

        Returns:
            `(n_test, n_train)`.
        """
        labels = {} if targets is None else {"labels": torch.as_tensor(targets)}
        batch: Any = (test_data, *labels.values())
        if isinstance(test_data, Mapping):
            batch = {**test_data, **labels}
        scores: Tensor = self.influence_method.influence(batch, target=None if labels else "predicted")
        return scores.to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """How suspect each training label is, `(n_train,)` float64: ranks times 1,000, 0 the least suspect.

        quanda has one use for it, the ranking of mislabeled examples. The order is that of the method's
        `mislabel_scores`, its self-influence where it has nothing better; equal scores share a rank.
        `influence_method.self_influence()` gives the values. `batch_size` is quanda's and changes nothing.

        Raises:
            ValueError: A score is not finite.
        """
        scores = self.influence_method.mislabel_scores()
        if not bool(scores.isfinite().all()):
            n_bad = int((~scores.isfinite()).sum())
            raise bad_value("mislabel_scores", "be finite", f"{n_bad} values that are not")
        ranks: Tensor = torch.unique(scores, return_inverse=True)[1]
        return _RANK_STEP * ranks.double()


@functools.cache
def explainer_for(method: type[InfluenceMethod]) -> type[InfluenceExplainer]:
    """The explainer class of a subclass of `InfluenceMethod`, named after it; the same class every time."""
    if not (isinstance(method, type) and issubclass(method, InfluenceMethod)):
        raise bad_type("method", "be a subclass of InfluenceMethod", method, "Give the class, not an object.")
    contents = {"method": method, "__doc__": method.__doc__, "__module__": __name__}
    return type(f"{method.__name__}Explainer", (InfluenceExplainer,), contents)


def _source(dataset: Any, batch_size: int) -> Any:
    """What a method reads: the data set itself, or quanda's loader where only quanda can collate it."""
    handler = get_dataset_handler(dataset)
    if isinstance(handler, HuggingFaceDatasetHandler):
        return handler.create_dataloader(dataset, batch_size=batch_size)
    return dataset


STRIDEExplainer = explainer_for(STRIDE)
