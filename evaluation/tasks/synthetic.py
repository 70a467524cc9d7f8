"""Synthetic data with planted influence: the examples behind a prediction are known before training.

Every class consists of small clusters that are far apart. A test point lies in one cluster, and only the
training examples of that cluster tell its class: they are its influential examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ...errors import bad_value


@dataclass(frozen=True, eq=False)
class PlantedClusters:
    """Training and test examples with their clusters.

    Attributes:
        train: Inputs `(n_train, n_features)` and labels `(n_train,)`.
        test: The same for the test points.
        train_clusters: Cluster of each training example, `(n_train,)`.
        test_clusters: Cluster of each test point, `(n_test,)`.
    """

    train: TensorDataset
    test: TensorDataset
    train_clusters: Tensor
    test_clusters: Tensor

    def influential(self) -> Tensor:
        """Whether a training example lies in the cluster of a test point, `(n_test, n_train)` bool."""
        return self.test_clusters[:, None] == self.train_clusters


def planted_clusters(
    n_train: int = 1000,
    n_test: int = 300,
    *,
    n_classes: int = 4,
    clusters_per_class: int = 10,
    n_features: int = 20,
    spread: float = 0.35,
    seed: int = 0,
) -> PlantedClusters:
    """Draw cluster centers of norm about sqrt(n_features), and points around them.

    Args:
        n_train: Training examples.
        n_test: Test examples.
        n_classes: Number of classes.
        clusters_per_class: Clusters of each class.
        n_features: Dimensions.
        spread: Standard deviation within a cluster in each dimension; that of the centers is 1.
        seed: Seed. The global random state is not used.

    Raises:
        ValueError: Fewer training examples than clusters.

    >>> data = planted_clusters(200, 30)
    >>> data.influential().shape
    torch.Size([30, 200])
    """
    n_clusters = n_classes * clusters_per_class
    if n_train < n_clusters:
        raise bad_value("n_train", f"be at least the number of clusters, {n_clusters}", n_train)
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_clusters, n_features, generator=generator)

    def draw(n: int) -> tuple[TensorDataset, Tensor]:
        clusters = torch.randint(n_clusters, (n,), generator=generator)
        x = centers[clusters] + spread * torch.randn(n, n_features, generator=generator)
        return TensorDataset(x, clusters % n_classes), clusters

    train, train_clusters = draw(n_train)
    test, test_clusters = draw(n_test)
    return PlantedClusters(train, test, train_clusters, test_clusters)
