"""`STRIDE`: training data attribution in activation space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .changing import ChangingTrainingSet
from .closed_form.options import ClosedForm
from .data.reading import Batch
from .errors import bad_type
from .features.options import Features
from .features.precomputed import Precomputed, PrecomputedNetwork
from .features.store import FeatureStore
from .influence.checkpoints.checkpoint import LoadCheckpoint, load_checkpoint
from .influence.estimate import Estimate, from_small_runs
from .losses import Loss, loss_of
from .operators import Operators, operators_of
from .options import html_table

Self = TypeVar("Self", bound="STRIDE")


class STRIDE(ChangingTrainingSet):
    """Which training examples made the model say this? One forward pass over the training set answers.

    By default the operators are the closed form (`ClosedForm`), which needs no subsets, no training and no
    gradient of the network. `operators=Trained.paper("mnist")` gives the paper's trained operators and Lasso
    recovery.

    A score is the predicted change of the response (by default the margin of the test label) when the
    training example is among the n_train: positive for proponents.

    Args:
        model: A trained classifier with logits `(n, n_classes)`; it is left as it was.
        train_dataset: Dataset or (not shuffling) DataLoader of `(inputs..., label)` or dicts.
        layers: Submodules whose outputs are features ("name:input" for what one reads); None takes
            what every weight layer reads, see `layers_`. Of examples with several positions, a convolution
            reads the patch around each (`layers.patches`).
        batch_size: Examples a forward pass, if a data set is given.
        device: Where the work is done; None takes the device of the model.
        checkpoints: State dicts or paths over which scores are averaged.
        checkpoints_load_func: `f(model, checkpoint)` loads one.
        held_out: Labeled data that the model has not seen: sets the temperature.
        operators: `ClosedForm(...)`, `Trained(...)`, other `Operators`, or a name: "closed-form", "trained".
        features: Which features are read if `layers` is not given, and their projection; None means what the
            operators want, `Features()` for the closed form.
        feature_store: A folder, or a `FeatureStore`, for what a pass over the training set gives. The
            first `fit` fills it; later ones, also of other processes and with other options, start
            from it without the pass. The closed form reads it chunk by chunk and never holds all of
            it; trained operators hold the features in memory.
        response: Default response; None means the first of the loss ("margin"), or what the operators want.
        target: Default class of the response; None means "label", or what the operators want.
        normalize: Default normalization, None, "cosine" or "deviation".
        memory_budget: Memory of one block of work: bytes, "512MiB", or "auto".
        loss: What the model was trained with (see `InfluenceMethod`).
        batch: How a batch is read (see `InfluenceMethod`).
        ids: A name for each training example (see `InfluenceMethod`).

    Attributes:
        operators_: The fitted operators (the last checkpoint's).
        layers_: Names of the layers that were read.
        n_features_: Number of features that the operators see.
        temperature_: T of the tempered residuals of closed-form operators (the last checkpoint's).
        history_: Losses of stage 1 of trained operators.
        coverage_: Which training examples can have a score, `(n_train,)` bool.
        projection_error_: Relative error of the features' kernel that a projection makes (the last
            checkpoint's); 0 without a projection.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = torch.nn.Linear(5, 2)
        >>> scores = STRIDE(model, TensorDataset(x, y)).influence((x[:3], y[:3]))
        >>> scores.shape
        torch.Size([3, 40])
    """

    fits_in_one_pass = True
    takes_positions = True

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int = 1024,
        device: torch.device | str | None = None,
        checkpoints: Sequence[Any] | None = None,
        checkpoints_load_func: LoadCheckpoint = load_checkpoint,
        held_out: Any = None,
        operators: Operators | str | None = None,
        features: Features | None = None,
        feature_store: str | Path | FeatureStore | None = None,
        response: str | None = None,
        target: str | None = None,
        normalize: str | None = None,
        memory_budget: int | str = "256MiB",
        loss: str | Loss = "cross_entropy",
        batch: Batch | None = None,
        ids: Sequence[Any] | None = None,
    ) -> None:
        self.operators = ClosedForm() if operators is None else operators_of(operators)
        usual: dict[str, Any] = {"response": None, "target": "label", "features": Features()}
        wanted = usual | self.operators.defaults()
        super().__init__(
            model,
            train_dataset,
            layers=layers,
            batch_size=batch_size,
            device=device,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
            held_out=held_out,
            response=wanted["response"] if response is None else response,
            target=wanted["target"] if target is None else target,
            normalize=normalize,
            memory_budget=memory_budget,
            loss=loss,
            batch=batch,
            ids=ids,
        )
        if features is not None and not isinstance(features, Features):
            raise bad_type("features", "be Features(...)", features)
        self.features: Features = wanted["features"] if features is None else features
        if feature_store is not None and not isinstance(feature_store, FeatureStore):
            feature_store = FeatureStore(feature_store)
        self.feature_store = feature_store
        self._precomputed: Precomputed | None = None
        self._changed = False

    def check_loss(self, loss: Loss) -> None:
        """Refuse a loss that the operators cannot take.

        Args:
            loss: What the model was trained with.

        Raises:
            ValueError: The operators need another loss.
        """
        self.operators.check_loss(loss)

    @classmethod
    def from_features(
        cls: type[Self],
        features: Any,
        logits: Any,
        labels: Any,
        *,
        widths: Sequence[int] | None = None,
        loss: str | Loss = "cross_entropy",
        projection: Features | None = None,
        **options: Any,
    ) -> Self:
        """STRIDE on precomputed features, without a model.

        Test batches are `(features, logits, labels)`.

        Args:
            features: `(n_train, n_features)`, tensor or numpy array, may be memory-mapped.
            logits: `(n_train, n_classes)`.
            labels: `(n_train,)`.
            widths: Widths of the layers that the columns come from; None means one layer.
            loss: What `logits` are: probabilities in their place are refused unless it says so.
            projection: `Features(projection=...)`.
            **options: As for `STRIDE`: `operators`, `response`, `memory_budget`, ...

        Raises:
            ValueError: Shapes that do not fit one another, or probabilities that are not declared.
        """
        batch = options.get("batch")
        weights = batch.sample_weight if isinstance(batch, Batch) else None
        known, dataset = Precomputed.checked(features, logits, labels, widths, loss_of(loss), weights)
        options = {"loss": loss, "features": projection, "layers": ["features"], **options}
        method = cls(PrecomputedNetwork(), dataset, **options)
        method._precomputed = known
        return method

    def _estimate(self, n_test: int, k: int | None) -> Estimate:
        found = self.operators.estimate(self, n_test, k)
        return from_small_runs(self.without_store(), n_test, k) if found is None else found

    def __repr__(self) -> str:
        fitted = "not fitted"
        if self._states is not None:
            fitted = f"n_train={self.n_train_}, layers={self.layers_}"
        return f"{type(self).__name__}(operators={self.operators.name!r}, {fitted})"

    def _repr_html_(self) -> str:
        facts: dict[str, Any] = {"fitted": self._states is not None}
        if self._states is not None:
            facts |= {"n_train": self.n_train_, "layers": ", ".join(self.layers_)}
        return f"<b>{type(self).__name__}</b>{html_table(facts)}{self.operators._repr_html_()}"
