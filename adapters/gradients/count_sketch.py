"""The count sketch (Charikar et al., 2002): a random projection without a matrix.

Each parameter is added to one of k coordinates with a random sign. With S the matrix that this stands for,
`E[S S^T] = I`: an inner product keeps its mean, and has a variance of at most `(|u|^2 |v|^2 + (u.v)^2) / k`.
The cost is one addition a parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .per_example import Gradients


def random_places(n_parameters: int, n_coordinates: int, seed: int) -> Tensor:
    """Coordinate of each parameter, plus k if its sign is -1, `(n_parameters,)` int32.

    Where every parameter can have a coordinate of its own, it has, and nothing is lost.

    Args:
        n_parameters: Number of all parameters together.
        n_coordinates: k.
        seed: Of the draws.
    """
    if n_coordinates >= n_parameters:
        return torch.arange(n_parameters, dtype=torch.int32, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    size = (n_parameters,)
    return torch.randint(2 * n_coordinates, size, generator=generator, dtype=torch.int32, device="cpu")


def count_sketch(gradients: Gradients, places: Tensor, n_coordinates: int) -> Tensor:
    """Projected gradients, `(n, n_coordinates)`.

    Args:
        gradients: `(n, *shape)` by parameter.
        places: Of all parameters in this order (`random_places`).
        n_coordinates: k.

    >>> places = torch.tensor([0, 2, 3])  # the last has the sign -1
    >>> count_sketch({"weight": torch.tensor([[5.0, 7.0, 9.0]])}, places, 3)
    tensor([[-4.,  0.,  7.]])
    """
    rows = [g.flatten(1) for g in gradients.values()]
    sums = rows[0].new_zeros(2 * n_coordinates, len(rows[0]))  # a parameter adds to one row of memory
    for part, place in zip(rows, places.split([row.shape[1] for row in rows]), strict=True):
        sums.index_add_(0, place, part.T)
    return (sums[:n_coordinates] - sums[n_coordinates:]).T.contiguous()
