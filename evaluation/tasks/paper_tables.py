"""The paper's tables of results as printed, and the comparison that measures each of them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import bad_choice

#: Training examples of the paper's data sets.
PAPER_SIZE = {"mnist": 60_000, "cifar10": 50_000}


@dataclass(frozen=True)
class PaperTable:
    """One table of results.

    Attributes:
        number: Its number in the paper.
        title: What it shows.
        task: "mnist" or "cifar10".
        measure: The measure of `compare` that reproduces it.
        columns: Its columns.
        printed: Its rows, as printed.
        methods: Names of the methods that are compared: those of its rows, and the closed form.
        settings: Options of the measure on the paper's full training set; see `settings_for`.
        differs: Where the paper's protocol differs, or is not stated.
    """

    number: int
    title: str
    task: str
    measure: str
    columns: tuple[str, ...]
    printed: Mapping[str, tuple[str, ...]]
    methods: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""

    def settings_for(self, n_train: int) -> dict[str, Any]:
        """Options of the measure on a training set of another size: the same shares of it are removed.

        Args:
            n_train: Number of training examples.

        >>> find_table("table8").settings_for(5_000)
        {'counts': (4, 8, 42, 83)}
        """
        if self.measure != "counterfactual":
            return dict(self.settings)
        counts: list[int] = []
        for count in self.settings["counts"]:
            share = round(count * n_train / PAPER_SIZE[self.task])
            counts.append(max(share, counts[-1] + 1 if counts else 1))
        return {**self.settings, "counts": tuple(counts)}

    @property
    def name(self) -> str:
        """Name on the command line. Table 1 is split in two, one for each data set."""
        return f"table{self.number}" + (f"-{self.task}" if self.number == 1 else "")


_BASELINES = ("DiagonalEKFAC", "EKFAC", "TracIn", "Similarity", "ClassRandom", "Random")
_DROP_COLUMNS = ("k=50", "k=100", "k=500", "k=1000")
_COUNTS = (50, 100, 500, 1000)
_OURS = (
    "Its STRIDE is the row of the paper's preset; STRIDE trained + Lasso has random subsets, and STRIDE is "
    "the closed form, which trains no operators and solves no Lasso. "
)
_FIDELITY = (
    "The paper correlates scores with per-example effects (C.1) without saying how these are estimated; the "
    "LDS of Park et al. stands beside it. " + _OURS
)
_LAYERS = (
    "Its ablations are the rows of trained operators with random subsets: no LDS loss drops the linearity "
    "and the stability loss, {}."
)
_DIAGONAL = _OURS + "Its EKFAC is the diagonal form of E.2 (DiagonalEKFAC); true EKFAC stands beside it."
_RANKING = "It ranks by high negative influence; every way of ranking stands here. " + _DIAGONAL


def _methods(task: str) -> tuple[str, ...]:
    """Three rows of STRIDE, then the baselines; the others are compared with the first, the closed form."""
    return ("STRIDE", f"STRIDE paper ({task})", "STRIDE trained + Lasso", *_BASELINES)


def _ablations(task: str, layer: str) -> tuple[str, ...]:
    left_out = ("no LDS loss", "no linearity", "no stability", layer)
    return (*_methods(task)[:3], *(f"STRIDE trained, {what}" for what in left_out))


TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        PaperTable(
            1,
            "Fidelity and cost on MNIST",
            "mnist",
            "linearized",
            ("Spearman", "Pearson", "setup s", "inference s"),
            {
                "TracIn": ("0.103 +- 0.18", "0.107 +- 0.13", "-", "22.35"),
                "EKFAC": ("0.105 +- 0.19", "0.106 +- 0.13", "17.18", "28.10"),
                "STRIDE": ("0.116 +- 0.06", "0.057 +- 0.11", "77.18", "2.21"),
            },
            _methods("mnist"),
            differs=_FIDELITY,
        ),
        PaperTable(
            1,
            "Fidelity and cost on CIFAR-10",
            "cifar10",
            "linearized",
            ("Spearman", "Pearson", "setup s", "inference s"),
            {
                "TracIn": ("0.276 +- 0.25", "0.655 +- 0.21", "-", "28.76"),
                "EKFAC": ("0.288 +- 0.21", "0.738 +- 0.17", "23.28", "27.10"),
                "STRIDE": ("0.319 +- 0.05", "0.663 +- 0.08", "110.38", "1.72"),
            },
            _methods("cifar10"),
            differs=_FIDELITY,
        ),
        PaperTable(
            6,
            "Ablations on MNIST",
            "mnist",
            "linearized",
            ("Spearman",),
            {"No LDS loss": ("0.149 +- 0.09",), "layer1": ("-0.012 +- 0.12",)},
            _ablations("mnist", "layer1"),
            differs=_FIDELITY + _LAYERS.format("layer1 reads the first hidden layer alone (relu1)"),
        ),
        PaperTable(
            7,
            "Ablations on CIFAR-10",
            "cifar10",
            "linearized",
            ("Spearman",),
            {"No LDS loss": ("0.248 +- 0.10",), "conv": ("0.223 +- 0.06",)},
            _ablations("cifar10", "conv"),
            differs=_FIDELITY
            + _LAYERS.format("conv reads the last convolution alone (relu2, pooled to 4x4)"),
        ),
        PaperTable(
            8,
            "Counterfactual drop on MNIST",
            "mnist",
            "counterfactual",
            _DROP_COLUMNS,
            {
                "ClassRandom": ("0.001 +- 0.00", "0.013 +- 0.01", "0.352 +- 0.06", "0.538 +- 0.08"),
                "EKFAC": ("0.002 +- 0.01", "0.016 +- 0.02", "0.438 +- 0.12", "0.737 +- 0.11"),
                "TracIn": ("0.003 +- 0.01", "0.012 +- 0.02", "0.424 +- 0.13", "0.728 +- 0.13"),
                "STRIDE": ("0.001 +- 0.00", "0.015 +- 0.03", "0.471 +- 0.12", "0.811 +- 0.10"),
            },
            _methods("mnist"),
            {"counts": _COUNTS},
            differs=_DIAGONAL,
        ),
        PaperTable(
            9,
            "Counterfactual drop on CIFAR-10",
            "cifar10",
            "counterfactual",
            _DROP_COLUMNS,
            {
                "ClassRandom": ("0.036 +- 0.02", "0.088 +- 0.05", "0.305 +- 0.06", "0.532 +- 0.07"),
                "EKFAC": ("0.067 +- 0.07", "0.171 +- 0.10", "0.591 +- 0.14", "0.846 +- 0.08"),
                "TracIn": ("0.066 +- 0.06", "0.151 +- 0.08", "0.540 +- 0.11", "0.776 +- 0.12"),
                "STRIDE": ("0.106 +- 0.07", "0.193 +- 0.09", "0.659 +- 0.11", "0.915 +- 0.06"),
            },
            _methods("cifar10"),
            {"counts": _COUNTS},
            differs=_DIAGONAL,
        ),
        PaperTable(
            10,
            "Mislabelled data on MNIST",
            "mnist",
            "mislabel",
            ("precision", "recall"),
            {
                "Random": ("0.100 +- 0.00",) * 2,
                "TracIn": ("0.785 +- 0.02",) * 2,
                "EKFAC": ("0.853 +- 0.02",) * 2,
                "STRIDE": ("0.921 +- 0.01",) * 2,
            },
            _methods("mnist"),
            {"rate": 0.1},
            differs=_RANKING,
        ),
        PaperTable(
            11,
            "Mislabelled data on CIFAR-10",
            "cifar10",
            "mislabel",
            ("precision", "recall"),
            {
                "Random": ("0.099 +- 0.00",) * 2,
                "TracIn": ("0.362 +- 0.02",) * 2,
                "EKFAC": ("0.513 +- 0.02",) * 2,
                "STRIDE": ("0.634 +- 0.02",) * 2,
            },
            _methods("cifar10"),
            {"rate": 0.1},
            differs=_RANKING,
        ),
        PaperTable(
            12,
            "Leaked test examples on MNIST",
            "mnist",
            "leakage",
            ("mean rank", "top-1"),
            {
                "Random": ("29964 +- 17320", "0.00"),
                "TracIn": ("0.00 +- 0.00", "1.00"),
                "EKFAC": ("0.00 +- 0.00", "1.00"),
                "STRIDE": ("0.00 +- 0.00", "1.00"),
            },
            _methods("mnist"),
            {"counts": (10,)},
            differs=_DIAGONAL,
        ),
        PaperTable(
            13,
            "Leaked test examples on CIFAR-10",
            "cifar10",
            "leakage",
            ("mean rank", "top-1"),
            {
                "Random": ("24975 +- 14433", "0.00"),
                "TracIn": ("1.10 +- 1.37", "0.60"),
                "EKFAC": ("0.50 +- 0.71", "0.80"),
                "STRIDE": ("0.20 +- 0.42", "0.90"),
            },
            _methods("cifar10"),
            {"counts": (10,)},
            differs=_DIAGONAL,
        ),
    )
}


def find_table(name: str) -> PaperTable:
    """A table by its name.

    Raises:
        ValueError: No table that is reproduced here has this name.
    """
    if name not in TABLES:
        raise bad_choice("table", name, list(TABLES))
    return TABLES[name]
