"""Speed of the closed form on examples with several positions, relative to the matrix products it needs.

The floor of `fit` is a forward pass and two products of N P x d x d. The floor of a query is the cheaper one
of two
products: between all pairs of positions, or between the summed matrices of test points and training examples.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...closed_form.options import ClosedForm
from ...stride import STRIDE
from ..measures.cost import in_a_fresh_process, median_seconds

#: N x P = 200,000 rows of d = 512 features and C = 50 outputs; 100 test points.
SIZES = {"n_train": 3125, "n_positions": 64, "n_features": 512, "n_outputs": 50, "n_test": 100}
_TOKENS, _BATCH = 1000, 128


class TokenModel(nn.Module):
    """Tokens to logits, through one layer of `width` features."""

    def __init__(self, width: int, n_outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_TOKENS, width)
        self.relu = nn.ReLU()
        self.head = nn.Linear(width, n_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(n, P, n_outputs)` of tokens `(n, P)`."""
        return self.head(self.relu(self.embedding(tokens)))  # type: ignore[no-any-return]


def bench_positions(repeats: int = 3, **sizes: int) -> list[dict[str, Any]]:
    """A row for each form and residuals, measured in its own process.

    Args:
        repeats: Timed repetitions.
        **sizes: Values that replace those of `SIZES`.

    Returns:
        Sizes, median seconds, and ratios to the floors.
    """
    every = {**SIZES, **sizes}
    return [
        in_a_fresh_process(partial(bench_form, form, residuals, repeats, **every))
        for form in ("rows", "matrix")
        for residuals in ("temperature", "both")
    ]


def bench_form(
    form: str,
    residuals: str,
    repeats: int,
    n_train: int,
    n_positions: int,
    n_features: int,
    n_outputs: int,
    n_test: int,
) -> dict[str, Any]:
    """Measure one form in this process.

    >>> row = bench_form("matrix", "both", 1, n_train=8, n_positions=4, n_features=8, n_outputs=3, n_test=2)
    >>> row["form"], row["n_train"]
    ('matrix', 8)
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TokenModel(n_features, n_outputs).eval()

    def draw(n: int) -> tuple[Tensor, Tensor]:
        shape = n, n_positions
        tokens = torch.randint(_TOKENS, shape, generator=generator)
        return tokens, torch.randint(n_outputs, shape, generator=generator)

    x, y = draw(n_train)
    test = draw(n_test)
    median = partial(median_seconds, device=torch.device("cpu"))

    @torch.no_grad()
    def forward() -> None:
        for batch in x.split(_BATCH):
            model(batch)

    rows = torch.randn(n_train * n_positions, n_features, generator=generator)
    signals = torch.randn(n_train * n_positions, n_outputs, generator=generator)
    phi, vectors = rows[: n_test * n_positions], signals[: n_test * n_positions]
    queries = torch.randn(n_test, n_features * n_outputs, generator=generator)

    def pairs() -> None:
        for block in range(0, len(rows), 4096):
            few = slice(block, block + 4096)
            (phi @ rows[few].T).mul_(vectors @ signals[few].T)

    def matrices() -> None:
        for block in range(0, n_train, 64):
            few = slice(block, block + 64)
            h = rows.reshape(n_train, n_positions, -1)[few]
            queries @ (h.transpose(1, 2) @ signals.reshape(n_train, n_positions, -1)[few]).flatten(1).T

    def fit() -> STRIDE:
        operators = ClosedForm(form=form, residuals=residuals)  # type: ignore[arg-type]
        method = STRIDE(model, TensorDataset(x, y), layers=["relu"], operators=operators, batch_size=_BATCH)
        return method.fit()

    method = fit()
    seconds = {
        "forward": median(forward, repeats),
        "product": median(lambda: rows.T @ rows, repeats),
        "fit": median(fit, repeats),
        "pairs": median(pairs, 1),
        "matrices": median(matrices, repeats),
        "query": median(lambda: method.influence(test), repeats),
    }
    return {
        "form": form,
        "residuals": residuals,
        "n_train": n_train,
        "n_positions": n_positions,
        "n_features": n_features,
        "n_outputs": n_outputs,
        "n_test": n_test,
        **seconds,
        "fit_ratio": seconds["fit"] / (seconds["forward"] + 2 * seconds["product"]),
        "query_ratio": seconds["query"] / min(seconds["pairs"], seconds["matrices"]),
    }
