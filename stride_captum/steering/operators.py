"""Steering operators: the encoder phi and the K steering matrices a_k (section 3, E.1)."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import bad_choice, bad_value
from ..system.saved_values import saved_as

Encoder = Literal["shared", "per-subset"]
Steering = Literal["logits", "representation"]


@saved_as("steering-operators")
class SteeringOperators(nn.Module):
    r"""K steering operators: `shift_k(x) = a_k^T phi(h(x))`, the change of the logits.

    phi is an MLP d -> d -> r with one ReLU (the paper gives r and "about d^2" parameters).

    - steering "logits" (section 3): phi(h) in R^r, a_k in R^{r x C}.
    - steering "representation" (E.1, equation 6): phi(h) in R^{r x d}, a_k = alpha_k in R^r. The
      features move, `h + phi(h)^T alpha_k`, and all that follows is one Linear with weight W, so
      that the logits move by `W phi(h)^T alpha_k`.
    - encoder "shared": one phi; "per-subset": K of them, stacked and applied as one batched product.

    All a_k start at 0, so that an untrained operator changes nothing and (2) and (4) are 0. The weights of
    phi are Gaussian with variance 2/d and 1/d: features of unit mean square give phi of unit mean square, and
    the first gradient of a_k is nonzero. phi gets its first gradient one step later.

    Attributes:
        steering_matrices: a, `(K, r, C)`, or `(K, r)` for "representation".
        hidden_weight, hidden_bias, output_weight, output_bias: phi; "per-subset" has K of each,
            stacked on the first dimension.
        head_weight: W, `(C, d)` buffer; None for "logits".
    """

    head_weight: Tensor | None

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        n_subsets: int,
        rank: int,
        *,
        encoder: Encoder = "shared",
        steering: Steering = "logits",
        head_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw phi and set a to 0.

        Args:
            n_features: d.
            n_classes: C.
            n_subsets: K.
            rank: r.
            encoder: "shared" or "per-subset".
            steering: "logits" or "representation".
            head_weight: W of the Linear behind the features, `(C, d)`; for "representation" only.
            generator: CPU generator of phi's initial weights; None means seed 0. The global random
                state is not used.
            dtype: Of all parameters.

        Raises:
            ValueError: An unknown choice, or a head that is missing, not wanted or of another shape.
        """
        super().__init__()
        if encoder not in get_args(Encoder):
            raise bad_choice("encoder", encoder, get_args(Encoder))
        if steering not in get_args(Steering):
            raise bad_choice("steering", steering, get_args(Steering))
        _check_head(head_weight, steering, (n_classes, n_features))
        self.encoder, self.steering = encoder, steering
        self.n_features, self.n_classes, self.rank = n_features, n_classes, rank
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        by_logits = steering == "logits"
        n_outputs = rank if by_logits else rank * n_features
        copies = () if encoder == "shared" else (n_subsets,)

        def gaussian(*shape: int, variance: float) -> nn.Parameter:
            draw = torch.empty(*copies, *shape, dtype=dtype, device="cpu")
            return nn.Parameter(draw.normal_(std=math.sqrt(variance), generator=generator))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device="cpu"))

        self.hidden_weight = gaussian(n_features, n_features, variance=2 / n_features)
        self.hidden_bias = zeros(*copies, n_features)
        self.output_weight = gaussian(n_outputs, n_features, variance=1 / n_features)
        self.output_bias = zeros(*copies, n_outputs)
        self.steering_matrices = zeros(n_subsets, rank, *((n_classes,) if by_logits else ()))
        copied = None if head_weight is None else head_weight.detach().to(dtype).clone()
        self.register_buffer("head_weight", copied)

    @property
    def n_subsets(self) -> int:
        """K."""
        return self.steering_matrices.shape[0]

    @property
    def stacked(self) -> list[str]:
        """Names of the parameters whose first dimension is the subset."""
        every = [name for name, _ in self.named_parameters()]
        return every if self.encoder == "per-subset" else ["steering_matrices"]

    def encode(self, features: Tensor) -> Tensor:
        """phi(h).

        Args:
            features: h, `(n, d)`; or `(K, n, d)`, different examples for each subset.

        Returns:
            `(n, r)` for a shared phi and `(n, d)` features, else `(K, n, r)`. "representation" has a
            last dimension d more.
        """
        hidden = _affine(features, self.hidden_weight, self.hidden_bias).relu()
        codes = _affine(hidden, self.output_weight, self.output_bias)
        return codes if self.steering == "logits" else codes.unflatten(-1, (self.rank, self.n_features))

    def to_saved(self) -> dict[str, Any]:
        """Arguments and parameters, for a file."""
        names = ("n_features", "n_classes", "n_subsets", "rank", "encoder", "steering")
        return {"options": {name: getattr(self, name) for name in names}, "state": dict(self.state_dict())}

    @classmethod
    def from_saved(cls, options: dict[str, Any], state: dict[str, Tensor]) -> SteeringOperators:
        """The inverse of `to_saved`."""
        first = next(iter(state.values()))
        operators = cls(**options, head_weight=state.get("head_weight")).to(first.dtype)
        operators.load_state_dict(state)
        return operators.requires_grad_(False).to(first.device)

    def shift(self, features: Tensor) -> Tensor:
        """Shift of the logits of each example by each operator.

        Args:
            features: h, `(n, d)`, the same for all subsets; or `(K, n, d)`.

        Returns:
            `(K, n, C)`.
        """
        return self._steer(self._directions(features))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Shifts of one batch per subset; a shared encoder runs once per example.

        Args:
            features: h of all examples in the batch, `(m, d)`.
            rows: Indices of the batch of each subset, `(K, n)` int64 in `[0, m)`.

        Returns:
            `(K, n, C)`, the same as `shift(features[rows])`.
        """
        if self.encoder == "per-subset":
            return self._steer(self._directions(F.embedding(rows, features)))
        directions = self._directions(features)
        gathered = F.embedding(rows, directions.flatten(1))
        return self._steer(gathered.unflatten(-1, directions.shape[1:]))

    def _directions(self, features: Tensor) -> Tensor:
        """Change of the logits per unit of steering: phi `(..., n, r)`, or phi W^T `(..., n, r, C)`."""
        codes = self.encode(features)
        return codes if self.head_weight is None else codes @ self.head_weight.T

    def _steer(self, directions: Tensor) -> Tensor:
        if self.steering == "logits":
            return directions @ self.steering_matrices
        if directions.dim() == 3:
            return torch.einsum("nrc,kr->knc", directions, self.steering_matrices)
        return torch.einsum("knrc,kr->knc", directions, self.steering_matrices)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + b` with one weight `(o, i)`, or one for each subset `(K, o, i)`."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    x = x.expand(len(weight), *x.shape[-2:])
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _check_head(head_weight: Tensor | None, steering: Steering, shape: tuple[int, int]) -> None:
    if steering == "logits":
        if head_weight is not None:
            raise bad_value("head_weight", "be None with steering='logits'", "a weight")
    elif head_weight is None:
        raise bad_value(
            "head_weight",
            "be the weight of the Linear behind the features with steering='representation'",
            None,
            "Equation (6) is offered only where one Linear follows; steering='logits' needs no head.",
        )
    elif tuple(head_weight.shape) != shape:
        raise bad_value(
            "head_weight", f"have shape (n_classes, n_features) = {shape}", tuple(head_weight.shape)
        )
