"""EKFAC in the eigenbasis of a layer's Kronecker factors, where it is a diagonal matrix.

kronfluence rotates the gradient G of each example, `(n_out, n_in)`, into the basis and back, each time
`n_out n_in (n_out + n_in)` products. Here tracked layers give gradients in the basis, `Q_b^T G Q_a`, to its
strategy "diagonal". A Linear layer with k rows an example, inputs a_t and output gradients b_t, has
`G = sum_t b_t a_t^T`: where k is small, its rows are rotated instead, `k (n_out^2 + n_in^2)` products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Methods of a tracked layer that `_Rotated` has in its place.
_OVERRIDDEN = ("compute_per_sample_gradient", "compute_pairwise_score", "compute_self_measurement_score")


@contextmanager
def in_eigenbasis(
    layers: Iterable[Any], factors: Mapping[str, Mapping[str, Tensor]], n_train: int = 0
) -> Iterator[None]:
    """Inside, tracked layers compute with gradients in their eigenbasis.

    Args:
        layers: Of the class `TrackedModule` of kronfluence.
        factors: Of `perform_eigendecomposition`.
        n_train: Examples that each query is multiplied with; 0 where there are no queries.
    """
    layers = list(layers)
    for layer in layers:
        of_outputs, of_inputs = (
            factors[f"{kind}_eigenvectors"][layer.name].to(layer.weight.device)
            for kind in ("gradient", "activation")
        )
        rotated = _Rotated(layer, of_outputs, of_inputs, n_train)
        for name in _OVERRIDDEN:
            setattr(layer, name, getattr(rotated, name))
    try:
        yield
    finally:
        for layer in layers:
            for name in _OVERRIDDEN:
                delattr(layer, name)


class _Rotated:
    """The gradients of a tracked layer, in the basis. Methods and arguments have the names of kronfluence.

    Args:
        layer: The layer.
        of_outputs: Q_b, `(n_out, n_out)`.
        of_inputs: Q_a, `(n_in, n_in)`; a bias is the last input, 1.
        n_train: As for `in_eigenbasis`.
    """

    def __init__(self, layer: Any, of_outputs: Tensor, of_inputs: Tensor, n_train: int) -> None:
        self.layer, self.of_outputs, self.of_inputs, self.n_train = layer, of_outputs, of_inputs, n_train
        self.linear = isinstance(layer.original_module, nn.Linear)
        self.back: tuple[Tensor, Tensor] | None = None

    def compute_per_sample_gradient(self, input_activation: Tensor, output_gradient: Tensor) -> Tensor:
        """`Q_b^T G Q_a` of each example, `(n, n_out, n_in)`."""
        if self._rows_cost_less(output_gradient, len(output_gradient), len(output_gradient)):
            return torch.einsum("nto,nti->noi", *self._rows(input_activation, output_gradient))
        gradients = type(self.layer).compute_per_sample_gradient
        plain: Tensor = gradients(self.layer, input_activation, output_gradient)
        return self.of_outputs.to(plain).T @ (plain @ self.of_inputs.to(plain))

    def compute_pairwise_score(
        self, preconditioned_gradient: Tensor, input_activation: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """Products of each of n_query preconditioned gradients with each gradient, `(n_query, n)`."""
        n_query, longer = len(preconditioned_gradient), max(preconditioned_gradient.shape[1:])
        if self._rows_cost_less(output_gradient, self.n_train, n_query):
            b, a = self._rows(input_activation, output_gradient)
            if a.shape[1] == 1 and n_query <= longer:  # without the gradients themselves, longer side first
                wide, narrow, matrices = a[:, 0], b[:, 0], preconditioned_gradient.transpose(1, 2)
                if wide.shape[1] < narrow.shape[1]:
                    wide, narrow, matrices = narrow, wide, preconditioned_gradient
                return ((wide @ matrices) * narrow).sum(2)
            return preconditioned_gradient.flatten(1) @ torch.einsum("nto,nti->noi", b, a).flatten(1).T
        if self.back is None or self.back[0] is not preconditioned_gradient:
            q_b, q_a = (basis.to(preconditioned_gradient) for basis in (self.of_outputs, self.of_inputs))
            back = q_b @ (preconditioned_gradient @ q_a.T)
            self.back = preconditioned_gradient, back  # the next training batch has the same
        plain = type(self.layer).compute_pairwise_score
        scores: Tensor = plain(self.layer, self.back[1], input_activation, output_gradient)
        return scores

    def compute_self_measurement_score(
        self, preconditioned_gradient: Tensor, input_activation: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """Product of each preconditioned gradient with the gradient of the same example, `(n,)`."""
        gradients = self.compute_per_sample_gradient(input_activation, output_gradient)
        return (preconditioned_gradient * gradients).sum((1, 2))  # einsum would lose digits in float32

    def _rows_cost_less(self, output_gradient: Tensor, n_examples: int, n_matrices: int) -> bool:
        """Whether rotating the rows of so many examples costs less than rotating so many gradients."""
        n_out, n_in = len(self.of_outputs), len(self.of_inputs)
        n_rows = n_examples * (output_gradient[0].numel() // n_out)
        return self.linear and n_rows * (n_out**2 + n_in**2) <= n_matrices * n_out * n_in * (n_out + n_in)

    def _rows(self, input_activation: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Output gradients `(n, k, n_out)` and inputs `(n, k, n_in)` in the basis."""
        n, width = len(output_gradient), input_activation.shape[-1]
        b = output_gradient.reshape(n, -1, len(self.of_outputs)) @ self.of_outputs.to(output_gradient)
        q_a = self.of_inputs.to(input_activation)
        a = input_activation.reshape(n, -1, width) @ q_a[:width]
        return b, a + q_a[width:].sum(0)  # the row of a bias, if there is one
