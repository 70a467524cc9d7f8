"""Interface of losses: all that the rest of the package asks about what a model was trained with.

One example has a row of outputs z `(n_outputs,)`, a label y and a weight omega. What a score needs is

    r = -d loss / dz                      the residual, at the outputs divided by a temperature
    H = E_y[d2 loss / dz2]                the expected Hessian
    f(z), df/dz                           responses and their gradients
    q                                     what a ridge head that has not seen the example says of y

Every function here takes rows, does not add them up, and says nothing of where rows come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import bad_choice, bad_value
from ..residuals import ratio_of_norms
from .hessians import Hessians
from .output_check import OutputCheck
from .weights import LabelWeights

#: "label", "predicted", or an index for each test point, `(n,)`.
Target = str | Tensor


class Loss(LabelWeights, ABC):
    """What a model was trained with: a frozen dataclass with its options, registered with `saved_as`.

    A loss of yours that is a sum over outputs derives from `SeparateOutputs`, which needs two functions.

    Attributes:
        name: What `loss=` calls it.
        responses: Names of the scalars that can be attributed, the default first; one of them is "loss".
        has_classes: Whether a label is a class, or a distribution over classes.
        tempered: Whether outputs divided by a temperature mean something.
        apart: Whether outputs are judged apart, so that none changes the scores of another.
        damps_outputs: Whether the output side of the curvature is damped.
        label_units: Whether residuals have the units of encoded labels: `y - q` is one for a prediction q.
        class_dim: Which dimension of outputs with several positions counts the outputs of one; None: the last
            of three, the second of four.

    >>> from stride_captum.losses import MSE
    >>> MSE().residuals(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    tensor([[2.]])
    """

    name: ClassVar[str]
    responses: ClassVar[tuple[str, ...]]
    has_classes: ClassVar[bool] = False
    tempered: ClassVar[bool] = True
    apart: ClassVar[bool] = False
    damps_outputs: ClassVar[bool] = True
    label_units: ClassVar[bool] = True
    class_dim: int | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the cross-entropy that trained operators are trained with."""
        return False

    # Outputs and labels.

    @abstractmethod
    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs of the model as rows z, `(n, n_outputs)`.

        Raises:
            ValueError: Outputs of another shape.
        """

    @abstractmethod
    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        """Labels as all functions below take them: `(n,)` int64 or `(n, n_outputs)`.

        Args:
            labels: As the data set gives them.
            n_outputs: Width of z.
            argument: What an error calls them.

        Raises:
            ValueError: Labels of another kind or shape.
        """

    def output_check(self, model: nn.Module | None) -> OutputCheck:
        """A look at the outputs for a training set: are they what the loss says they are?"""
        return OutputCheck()

    def check_response(self, response: str) -> None:
        """Refuse a response that this loss does not have.

        Raises:
            ValueError: It has none of this name.
        """
        if response not in self.responses:
            raise bad_choice("response", response, self.responses)

    # Responses.

    def response_of(self, outputs: Tensor, response: str) -> str:
        """The response that is meant, given the outputs as they came."""
        return response

    @abstractmethod
    def asked(self, logits: Tensor, labels: Tensor | None, target: Target, response: str) -> Tensor:
        """What a response is about at each test point: of the form of `labels`.

        Args:
            logits: z, `(n, n_outputs)`.
            labels: Of the test points, as they came; None where there are none.
            target: "label", "predicted", or an index for each test point, `(n,)`.
            response: One of `responses`.

        Raises:
            ValueError: A target that does not exist, or labels that are missing or of another kind.
        """

    @abstractmethod
    def response_value(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        """The response at each row, `(n,)`, for `logits` `(n, n_outputs)` and what is `asked`."""

    def response_gradient(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        """Its gradient with respect to the outputs, `(n, n_outputs)`; by autograd unless a loss knows it."""
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            value = self.response_value(leaf, asked, response).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
        return gradient

    @abstractmethod
    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row, `(n,)`."""

    # Residuals and curvature.

    @abstractmethod
    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """R at `z / T`, `(n, n_outputs)` in the dtype of the logits."""

    @abstractmethod
    def hessians(self, logits: Tensor, temperature: float) -> Hessians:
        """H at `z / T`, for logits in float64."""

    def residual_labels(self, labels: Tensor, like: Tensor) -> Tensor:
        """Labels as `Hessians.residuals` takes them: class indices, or of the form of `like`."""
        return labels.to(like)

    @abstractmethod
    def covariance(self, total: Tensor) -> Tensor:
        """The sum of H over rows from what `Hessians.add_to` has added up."""

    def unit(self, covariance: Tensor) -> float:
        """The mean of the eigenvalues that E[H] can have: unit of the curvature."""
        diagonal = covariance if covariance.ndim == 1 else covariance.diagonal()
        return float(diagonal.mean())

    def level(self, covariance: Tensor) -> Tensor | float:
        """What a relative damping is relative to, given E[H] in its unit: a number, or one an output."""
        return covariance if self.apart else 1.0

    def certainty(self, logits: Tensor) -> Tensor:
        """Of some rows, how large outputs must be divided to leave some uncertainty; any shape."""
        return logits.abs()

    @abstractmethod
    def potential(self, logits: Tensor) -> Tensor:
        """A function of z, `(n,)`, with H as second derivative: without weights, the loss plus `<z, y>`."""

    # Labels drawn from the model, of which the Fisher information is a mean.

    def n_draws(self, n_outputs: int) -> int:
        """How many numbers draw the label of one row."""
        return n_outputs

    @abstractmethod
    def drawn_residuals(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """R for labels that the model draws, `(n, n_outputs)`.

        Args:
            logits: z.
            uniforms: Numbers in [0, 1), `(n, n_draws)`.
        """

    @abstractmethod
    def hessian_factors(self, logits: Tensor) -> list[Tensor]:
        """Vectors v, `(n, n_outputs)` each, such that H is the sum of `v v^T`."""

    # Out of the sample: a ridge head on features, and the temperature.

    @abstractmethod
    def encoded(self, labels: Tensor, like: Tensor) -> Tensor:
        """What a ridge head is fitted to, `(n, n_outputs)` in the dtype of `like`, of that width."""

    def left_out(self, fitted: Tensor, slack: Tensor, labels: Tensor) -> Tensor:
        """Residuals of the head fitted without the example, in closed form, `(n, n_outputs)`: a new tensor.

        Args:
            fitted: What the head says that has seen it, `(n, n_outputs)`.
            slack: 1 minus its leverage, `(n,)`.
            labels: y.
        """
        divisor = slack.clamp_min(torch.finfo(slack.dtype).eps)[:, None]
        return (self.encoded(labels, fitted) - fitted) / divisor

    def projection_shift(self, left_out: Tensor, labels: Tensor) -> Tensor:
        """What `projected` needs to know of each row that is dear to compute, `(n, 1)`."""
        return left_out.new_zeros(len(left_out), 1)

    @abstractmethod
    def projected(self, left_out: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
        """`y - q` where q is the prediction `y - left_out` moved to the nearest one that can be.

        Args:
            left_out: `(n, n_outputs)`; may be written into.
            labels: y.
            shifts: Of `projection_shift`.
        """

    @abstractmethod
    def possible(self, predictions: Tensor) -> Tensor:
        """Q of predictions of the head for other examples, `(n, n_outputs)`."""

    def of_ridge_head(
        self, differences: Tensor, logits: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """`y - q` of a ridge head as residuals of the loss at `z / T`, `(n, n_outputs)`."""
        return differences

    def ridge_ratio(self, residual_square: Any, ridge_square: Any) -> Tensor | float:
        """Factor of the ridge part of the residuals "both": gives it the norm of the other part.

        Args:
            residual_square: Squares of the other part, summed over examples and outputs; where outputs are
                judged apart, of each one, `(n_outputs,)`.
            ridge_square: Of the ridge part.
        """
        if not self.apart:
            return ratio_of_norms(float(residual_square), float(ridge_square))
        safe = torch.where(ridge_square > 0, ridge_square, 1.0)
        return torch.where(ridge_square > 0, residual_square / safe, 1.0).sqrt()

    def mean_residuals(self, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """How far each prediction is from its label at `z / T`, in [0, 1], `(n,)`; matches temperatures."""
        return self.residuals(logits, labels, temperature).abs().mean(1)

    # For particular methods.

    def doubts(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Q with `r = q df/dz` for the default response f, `(n, 1)`; None where r has another direction."""
        return None

    def refuse(self, method: str, why: str) -> None:
        """Refuse a loss without classes for a method that compares them.

        Raises:
            ValueError: Labels are no classes.
        """
        if not self.has_classes:
            must = f"be one whose labels are classes for {method}, {why}"
            raise bad_value("loss", must, repr(self.name), "Use another method.")


def needs_labels(target: Any) -> ValueError:
    """The error for test points without the labels that a response is about."""
    return bad_value(
        "inputs",
        f"carry labels, as in (x, y), when target={target!r}",
        "a batch without labels",
        "Add them, or ask for target='predicted' or a class index.",
    )
