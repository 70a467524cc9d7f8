"""Scores of one query with their cost, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ....system.atomic import atomic_write
from ...measures.cost import Cost


@dataclass(frozen=True)
class Answer:
    """Scores of one query, and their cost.

    Attributes:
        values: The scores.
        fit_seconds: Setup.
        seconds: The query, without setup.
        forward_seconds: One forward pass over the training set, measured in the same run.
        peak_bytes: Peak memory of the method; None if it was not measured.
    """

    values: NDArray[Any]
    fit_seconds: float
    seconds: float
    forward_seconds: float
    peak_bytes: int | None

    def cost(self, n_queries: int) -> Cost:
        """As the cost of `n_queries` test points."""
        return Cost(
            fit_seconds=self.fit_seconds,
            query_seconds=self.seconds,
            n_queries=n_queries,
            forward_seconds=self.forward_seconds,
            peak_bytes=self.peak_bytes,
        )


def write_answer(path: Path, answer: Answer) -> None:
    """Write a file, in one step."""
    from safetensors.numpy import save_file

    facts = {k: v for k, v in vars(answer).items() if k != "values"}
    metadata = {"cost": json.dumps(facts)}
    atomic_write(path, lambda name: save_file({"values": answer.values}, name, metadata))


def read_answer(path: Path) -> tuple[Answer | None, str | None]:
    """The scores and None; or None and what is wrong with the file; or (None, None) if there is no file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return Answer(values=file.get_tensor("values"), **json.loads(file.metadata()["cost"])), None
    except FileNotFoundError:
        return None, None
    except (SafetensorError, OSError, KeyError, TypeError):
        return None, "cut off or not an answer"
