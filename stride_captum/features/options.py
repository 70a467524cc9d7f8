"""Options of the features h(x): choice of layers and projection of wide ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import bad_value
from ..options import Options, check_choice, check_count
from ..system.saved_values import saved_as


@saved_as("options.features")
@dataclass(frozen=True, kw_only=True)
class Features(Options):
    """Which features `STRIDE` reads when `layers` is not given, and their projection.

    Attributes:
        select: "all" (what every weight layer reads) or "penultimate" (what the last one reads; B.1).
        max_width: Bound on the total width of all features that "all" selects: maps are pooled, patches of
            convolutions given up, and then layers.
        projection: Projection of layers wider than `projection_width`: None, "random" or "pca" (see
            `stride_captum.features.projection`); `STRIDE.projection_error_` is the relative error of the
            kernel.
        projection_width: Width of such a layer after projection.
        seed: Of the random directions.

    >>> Features(select="penultimate").max_width
    4096
    """

    name: ClassVar[str] = "features"

    select: Literal["all", "penultimate"] = "all"
    max_width: int = 4096
    projection: Literal["random", "pca"] | None = None
    projection_width: int = 512
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of their range."""
        check_choice("select", self.select, ("all", "penultimate"))
        if self.projection not in (None, "random", "pca"):
            raise bad_value("projection", "be None, 'random' or 'pca'", repr(self.projection))
        check_count("max_width", self.max_width)
        check_count("projection_width", self.projection_width)
        check_count("seed", self.seed, least=0)
