"""Label-noise detectors that need no influence.

All have `mislabel_scores() -> (n_train,)`, high for a suspect label, as every `InfluenceMethod` has, and
take `(model, train_dataset, *, layers, batch_size)`. How suspect a label is does not depend on the weight of
its example or class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import inputs as data
from ..data.passes import Passes
from ..data.reading import Batch, Reading
from ..errors import bad_choice, bad_type, bad_value, whole_number
from ..features.options import Features
from ..influence.checkpoints.checkpoint import (
    Checkpoint,
    apart_from,
    checkpoint_list,
    load_checkpoint,
    unseen_by,
    weights_of,
)
from ..layers.activations import Tap, check_finite, default_taps, named_taps, recording
from ..losses import Loss, loss_of
from ..system.devices import device_of, full_precision
from ..system.packages import install_command
from ..system.preserve_state import preserve_state
from ._weights import refuse_weights
from .folds import FitPredict, logistic_regression, out_of_sample_probabilities
from .gradients.working_copies import widened

#: The label quality scores of cleanlab.
QUALITIES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


class LabelNoiseDetector(ABC):
    """Base class: a score for each training label, high if the label is suspect.

    Args:
        model: A trained classifier; it is evaluated in eval mode and left as it was.
        train_dataset: Dataset or (not shuffling) DataLoader of `(inputs..., label)` or dicts.
        layers: Submodules whose outputs are features, for detectors that read them; None selects them.
        batch_size: Examples a forward pass, where a data set is given.
        loss: What the model was trained with (see `InfluenceMethod`).
        batch: How a batch is read (see `InfluenceMethod`).

    >>> class Coin(LabelNoiseDetector):
    ...     def mislabel_scores(self):
    ...         return torch.rand(len(self.train_dataset))
    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> Coin(model, train).mislabel_scores().shape
    torch.Size([48])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int = 1024,
        loss: str | Loss = "cross_entropy",
        batch: Batch | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise bad_type("model", "be a torch.nn.Module", model)
        data.check_training_set(train_dataset)
        self.model = model
        self.train_dataset = train_dataset
        self.layers = layers
        self.batch_size = whole_number("batch_size", batch_size)
        self.loss = loss_of(loss)
        self.batch = Batch() if batch is None else batch
        self._passes = Passes(train_dataset, self.batch_size, Reading(self.batch, self.loss))

    @abstractmethod
    def mislabel_scores(self) -> Tensor:
        """How suspect each training label is, `(n_train,)`. High means suspect."""

    def _read(self, taps: Sequence[Tap] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Features at the taps `(n_train, n_features)`, logits `(n_train, n_classes)` and labels."""
        features: list[Tensor] = []
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        precision = full_precision(device_of(self.model))
        with preserve_state(self.model), torch.no_grad(), precision, recording(self.model, taps) as run:
            check = self.loss.output_check(self.model)
            for batch in self._passes.walk():
                batch = batch.to(device_of(self.model))
                outputs, rows = run(batch)
                check.look(outputs, sum(map(len, labels)))
                logits.append(widened(batch.logits_of(outputs)))
                features.append(torch.cat(rows, 1) if rows else logits[-1].new_empty(len(logits[-1]), 0))
                if batch.labels is None:
                    raise bad_value("train_dataset", "give one label per example", "none")
                labels.append(self.loss.labels(batch.labels, logits[-1].shape[1], "train_dataset"))
            check.finish()
        return torch.cat(features), torch.cat(logits), torch.cat(labels)


class LossDetector(LabelNoiseDetector):
    """The training loss of each example: a wrong label is learned late, or not at all.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> suspicion = LossDetector(model, train).mislabel_scores()
    >>> bool((suspicion >= 0).all())
    True
    """

    def mislabel_scores(self) -> Tensor:
        """The loss of each example, `(n_train,)`: `-log p_y = log(1 + exp(-margin))` with cross-entropy."""
        _, logits, labels = self._read()
        return self.loss.values(logits, labels)


class ConfidentLearning(LabelNoiseDetector):
    """Cleanlab's label quality on out-of-sample probabilities (Northcutt et al., JAIR 2021).

    The probabilities come from k folds (`out_of_sample_probabilities`): the model under study has seen
    every label and is not asked. What is fitted on each fold is `fit_predict`, for instance a retraining
    of the network; by default a multinomial logistic regression on what the weight layers of the network
    read, without the last one: these features have memorized the labels least. A network with a single
    such place keeps it. Raw images are never read, a flat float input is.

    With `checkpoints` of models that have seen a part of the data each (`retrain`), nothing is fitted: the
    probabilities of an example are the mean of those of the models that have not seen it.

    Args:
        model: As for every detector.
        train_dataset: As for every detector.
        checkpoints: `Checkpoint`s with `seen`: each example is unseen by one of them, at least.
        fit_predict: `f(train_rows, test_rows) -> (len(test_rows), n_classes)` probabilities, both index
            arrays into the training set; None for the logistic regression.
        n_folds: Folds, from 2 to n_train.
        seed: Of the folds.
        quality: Cleanlab's score: "self_confidence" (p_y), "normalized_margin" (p_y minus the largest
            other) or "confidence_weighted_entropy".
        **options: Those of `LabelNoiseDetector`.

    Raises:
        ImportError: Cleanlab is not installed.
        ValueError: Both `checkpoints` and `fit_predict` are given, or all checkpoints have seen an example.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> suspicion = ConfidentLearning(model, train, n_folds=3).mislabel_scores()
    >>> bool((suspicion >= 0).all() and (suspicion <= 1).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        checkpoints: Sequence[Checkpoint] | None = None,
        fit_predict: FitPredict | None = None,
        n_folds: int = 5,
        seed: int = 0,
        quality: str = "self_confidence",
        **options: Any,
    ) -> None:
        super().__init__(model, train_dataset, **options)
        self.loss.refuse(type(self).__name__, "which fits a classifier")
        if quality not in QUALITIES:
            raise bad_choice("quality", quality, QUALITIES)
        if checkpoints is not None and fit_predict is not None:
            raise bad_value("checkpoints", "be given without `fit_predict`", "both")
        if fit_predict is None and checkpoints is None:
            why = "its logistic regression counts every example once"
            name, remedy = type(self).__name__, "Give `fit_predict`, which may weigh them."
            refuse_weights(name, self.batch, self.loss, why, remedy)
        self._quality_scores = _cleanlab_quality_scores()
        self.checkpoints = None if checkpoints is None else apart_from(model, checkpoint_list(checkpoints))
        self.fit_predict = fit_predict
        self.n_folds = n_folds
        self.seed = seed
        self.quality = quality

    def mislabel_scores(self) -> Tensor:
        """One minus cleanlab's label quality, `(n_train,)` float64 in [0, 1]."""
        from_features = self.fit_predict is None and self.checkpoints is None
        features, logits, classes = self._read(self._taps() if from_features else ())
        if classes.ndim != 1:
            must = "hold class indices for ConfidentLearning, which fits a classifier"
            raise bad_value("train_dataset", must, "distributions over classes", "Write labels.argmax(1).")
        labels = classes.cpu().numpy()
        fit_predict = self.fit_predict
        if self.checkpoints is not None:
            probabilities = self._of_models_of_parts(self.checkpoints, len(labels))
        else:
            if fit_predict is None:
                check_finite(features)
                fit_predict = logistic_regression(features.cpu().numpy(), labels, logits.shape[1])
            probabilities = out_of_sample_probabilities(fit_predict, labels, self.n_folds, self.seed)
        quality = self._quality_scores(labels, probabilities, method=self.quality)
        return 1 - torch.from_numpy(np.asarray(quality, dtype=np.float64))

    def _of_models_of_parts(self, checkpoints: Sequence[Checkpoint], n: int) -> NDArray[np.float64]:
        """Mean probabilities `(n, n_classes)` of the models that have not seen an example."""
        unseen = torch.stack([unseen_by(checkpoint, n) for checkpoint in checkpoints])
        if not bool(unseen.any(0).all()):
            must = "leave every example unseen by one of them"
            example = f"example {int(unseen.any(0).int().argmin())}, which all have seen"
            raise bad_value("checkpoints", must, example, "Pass models of parts, as `retrain` gives them.")
        total: Any = None
        with preserve_state(self.model, weights=True) as model:
            for checkpoint, rows in zip(checkpoints, unseen, strict=True):
                if not bool(rows.any()):
                    continue
                load_checkpoint(model, weights_of(checkpoint))
                probabilities = self._read()[1].cpu().double().softmax(1)
                total = torch.zeros_like(probabilities) if total is None else total
                total[rows] += probabilities[rows]
        return np.asarray(total / unseen.sum(0)[:, None])

    def _taps(self) -> list[Tap]:
        with preserve_state(self.model), torch.no_grad():
            few = self._passes.first().to(device_of(self.model)).first(2)
            if self.layers is not None:
                return named_taps(self.model, self.layers, few)
            taps = default_taps(self.model, few, Features().max_width)
        return taps[:-1] or taps


def _cleanlab_quality_scores() -> Callable[..., Any]:
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        hint = f"ConfidentLearning needs cleanlab: {install_command('cleanlab')}"
        raise ImportError(hint) from error
    scores: Callable[..., Any] = get_label_quality_scores
    return scores
