"""Arithmetic of a fit and a query on many GPUs: bytes, operations and network, from rates.

    python -m stride_captum.evaluation.cluster_cost --n-train 1e9 --gpus 64 --gemm 4.1e13

Each part is what a rank does one after the other, so that the sum is an upper bound: transfers and
products may overlap. Nothing here is measured. Put in the rates that you have measured on one GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class ClusterCost:
    """Cost of `DistributedSTRIDE` with its default options, N examples on W GPUs.

    One share has n = N / W examples. With s = 5/8, the part of a symmetric product that is computed
    (`stride_captum.linalg`), a fit takes in each GPU

        forward      n / forward                              the model on the share
        products     (4 s n d^2 + 4 n d C) / gemm             Gram matrix, leverages; targets, fitted values
        factors      (2 (d^3/3 + 2 d^3/3) + 2 n C^2) / gemm64 Cholesky and inverse, twice; Sigma: float64
        all-reduce   2 (W - 1)/W 8 (d^2 + d C + C^2) / network   one ring, float64
        write        n (b d + 4 C) / disk                     features, and logits in float32

    and a query of q test points, of which 1,024 are taken at a time,

        read         p n (b d + 4 C) / disk                   features and logits, p = ceil(q / 1024) times
        products     (2 q n (d + C) + 2 p n d C) / gemm       scores; fitted values of the residuals
        broadcast    4 q (d + C) / network                    features and gradients of the test points
        gather       12 q k W / network                       the k best of every rank

    Residuals, which a smaller training set keeps in memory, are computed from features and logits in every
    pass. What a GPU does keep of each example is 29 bytes of vectors (`vector_bytes`).

    The default rates are an assumption and no measurement: half of the published dense peaks of an H100 SXM
    (float32 67 TFLOP/s, float64 67 TFLOP/s with tensor cores), half of a 400 Gbit/s link, a disk of 5 GB/s
    beside each GPU, and 2,500 images a second through a ResNet-50.

    Attributes:
        n_train: N.
        gpus: W.
        n_features: d, the width of all layers that are read.
        n_classes: C.
        n_test: q.
        k: Training examples that a query asks for.
        feature_bytes: b, bytes of a stored feature: 2 for bfloat16 and float16, 4 for float32.
        forward: Training examples a second through the model.
        gemm: Float32 operations a second (a multiplication and an addition are two).
        gemm64: Float64 operations a second.
        network: Bytes a second of one GPU's link, in each direction.
        disk: Bytes a second of the store that one GPU reads and writes.

    >>> ClusterCost(n_train=64, gpus=64, n_features=1, n_classes=2, forward=0.5).fit()["forward"]
    2.0
    """

    n_train: float = 1e9
    gpus: int = 64
    n_features: int = 4096
    n_classes: int = 1000
    n_test: int = 1000
    k: int = 100
    feature_bytes: int = 2
    forward: float = 2.5e3
    gemm: float = 0.5 * 67e12
    gemm64: float = 0.5 * 67e12
    network: float = 0.5 * 50e9
    disk: float = 5e9

    @property
    def share(self) -> float:
        """n, the training examples of one GPU."""
        return self.n_train / self.gpus

    def disk_bytes(self) -> float:
        """Of the features and logits of one share."""
        return self.share * (self.feature_bytes * self.n_features + 4 * self.n_classes)

    def vector_bytes(self) -> float:
        """In memory: label, slack, shift, norm and one flag of each example of a share."""
        return self.share * (8 + 8 + 8 + 4 + 1)

    @property
    def passes(self) -> int:
        """How often a query reads the share."""
        return -(-self.n_test // 1024)

    def network_bytes(self) -> float:
        """What one GPU sends in the all-reductions of a fit."""
        d, c = self.n_features + 1, self.n_classes
        return 2 * (self.gpus - 1) / self.gpus * 8 * (d * d + d * c + c * c)

    def gemm_operations(self) -> float:
        """Float32 operations of one share in a fit."""
        n, d, c = self.share, self.n_features, self.n_classes
        return 4 * (5 / 8) * n * d * d + 4 * n * d * c

    def fit(self) -> dict[str, float]:
        """Seconds of the parts of a fit."""
        d, c = self.n_features + 1, self.n_classes
        return {
            "forward": self.share / self.forward,
            "products": self.gemm_operations() / self.gemm,
            "factors": (2 * d**3 + 2 * self.share * c * c) / self.gemm64,
            "all-reduce": self.network_bytes() / self.network,
            "write": self.disk_bytes() / self.disk,
        }

    def query(self) -> dict[str, float]:
        """Seconds of the parts of a query, the forward pass of the test points left out."""
        d, c, q = self.n_features, self.n_classes, self.n_test
        return {
            "read": self.passes * self.disk_bytes() / self.disk,
            "products": 2 * self.share * (q * (d + c) + self.passes * d * c) / self.gemm,
            "broadcast": 4 * q * (d + c) / self.network,
            "gather": 12 * q * self.k * self.gpus / self.network,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.n_train:.3g} examples, d = {self.n_features:,}, C = {self.n_classes:,}, "
            f"{self.gpus} GPUs: {self.share:.3g} examples each",
            f"in memory {self.vector_bytes() / 1e9:,.2g} GB a GPU beside matrices and one block",
            f"on disk {self.disk_bytes() / 1e9:,.0f} GB a GPU, "
            f"{self.disk_bytes() * self.gpus / 1e12:,.1f} TB in all",
            f"sent in a fit {self.network_bytes() / 1e9:.2f} GB a GPU",
        ]
        for name, parts in (
            ("fit", self.fit()),
            (f"top-{self.k} of {self.n_test:,} test points", self.query()),
        ):
            shown = ", ".join(f"{part} {seconds:,.3g} s" for part, seconds in parts.items())
            lines.append(f"{name}: {sum(parts.values()):,.0f} s ({shown})")
        return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the cost for the rates that are given."""
    parser = argparse.ArgumentParser(description="Cost of STRIDE on many GPUs, from sizes and rates.")
    for field in fields(ClusterCost):
        kind = type(field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    print(ClusterCost(**vars(parser.parse_args(arguments))))
    print(
        "Arithmetic, not a measurement. Rates that are not given are assumed: see --help and the docstring."
    )


if __name__ == "__main__":
    main()
