"""Rows of a comparison: what each method is called, how it is built, and what may be tuned.

Every gradient baseline is there twice: with the training residuals, as published, and with the
out-of-sample residuals that STRIDE uses. Its options are chosen on the tuning half of the test points.

Every grid has `GRID_SIZE` points, the defaults of the method among them, so that no row gains from a larger
choice. TracIn as published, the similarities and the controls have no grid: they have nothing to tune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

from .... import adapters
from ....closed_form.options import ClosedForm
from ....designs import Partition
from ....errors import bad_choice
from ....influence.method import InfluenceMethod
from ....operators import Operators
from ....steering.options import Trained
from ....stride import STRIDE
from ...measures.cost import Build
from ...retraining.attributed_models import even_epochs, log_epochs


@dataclass(frozen=True)
class MethodSpec:
    """A method in a comparison.

    Attributes:
        name: Its row.
        build: Called with the model, the training set and the options of a grid point.
        grid: Option sets among which the tuning half of the test points chooses; one means untuned.
        n_checkpoints: Checkpoints of the training that `build` is given as the option `checkpoints`,
            the attributed model last, evenly spaced; 1 gives none, and "log" those after epochs 1, 2, 3, 5,
            8, 12, 20, ... and the last.
        partitions: Partitions of the training set into halves on which models are trained for this row:
            `build` is given these models as `checkpoints`, and the attributed model is not used. Each
            partition costs what one training costs.
        needs: Module of an extra without which it cannot run.
        settable: Options that may be set on a fitted method, so that a grid over them fits once.
        cache_key: Vouches for the row: what it answers depends on this key, the options, the weights and the
            training set alone. None (the default) names the answers by everything that `build` makes.
        default: Options where nothing chooses among several points of the grid, that is without LDS; {} is
            what the method does by default.

    A spec is called as its `build` is.

    >>> row = MethodSpec("TracIn, T=2", adapter(adapters.TracIn, residuals="temperature", temperature=2.0))
    >>> row.available
    True
    """

    name: str
    build: Build
    grid: Sequence[Mapping[str, Any]] = field(default=({},))
    n_checkpoints: int | Literal["log"] = 1
    partitions: int = 0
    needs: str | None = None
    settable: frozenset[str] = frozenset()
    cache_key: str | None = None
    default: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: Any, data: Any, options: Mapping[str, Any]) -> InfluenceMethod:
        """The method on a model and its training set."""
        return self.build(model, data, options)

    @property
    def uses_model_alone(self) -> bool:
        """Whether it needs nothing but the attributed model."""
        return self.n_checkpoints == 1 and not self.partitions

    def epochs(self, epochs: int) -> list[int]:
        """Epochs before the last of a training after which it wants checkpoints."""
        if self.n_checkpoints == 1:
            return []
        if self.n_checkpoints == "log":
            return log_epochs(epochs)
        return even_epochs(epochs, self.n_checkpoints - 1)

    @property
    def fewest_epochs(self) -> int:
        """Epochs that a training must have."""
        return 2 if self.n_checkpoints == "log" else self.n_checkpoints

    @property
    def available(self) -> bool:
        """Whether the extra that it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None


def stride(
    operators: type[Operators] = ClosedForm, *, layers: Sequence[str] | None = None, **fixed: Any
) -> Build:
    """STRIDE with operators of one kind; the options of a grid point are theirs.

    Args:
        operators: `ClosedForm`, `Trained`, or yours.
        layers: As for `STRIDE`.
        **fixed: Options of the operators.
    """

    def build(model: Any, data: Any, options: Mapping[str, Any]) -> STRIDE:
        own, beside = _apart({**fixed, **options})
        return STRIDE(model, data, layers=layers, operators=operators(**own), **beside)

    return build


def _apart(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of operators, and those of STRIDE itself."""
    own = {name: value for name, value in options.items() if name not in ("checkpoints", "loss")}
    return own, {name: value for name, value in options.items() if name not in own}


def stride_paper(preset: str) -> Build:
    """STRIDE with the settings of Table 4, on smaller training sets as `fitting` says."""

    def build(model: Any, data: Any, options: Mapping[str, Any]) -> STRIDE:
        own, beside = _apart({**fitting(len(data)), **options})
        return STRIDE(model, data, operators=Trained.paper(preset, **own), **beside)

    return build


def fitting(n_train: int) -> dict[str, Any]:
    """B.2's 50 subsets of 100 need 5,000 examples: smaller training sets are split into 50 parts.

    >>> fitting(60_000), fitting(300)
    ({}, {'subsets': Partition(n_subsets=50, size=None)})
    """
    return {} if n_train >= 5_000 else {"subsets": Partition(50)}


def adapter(cls: type[InfluenceMethod], **fixed: Any) -> Build:
    """Another method."""
    return lambda model, data, options: cls(model, data, **{**fixed, **options})


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations.

    >>> grid(damping=(0.1, 1.0), residuals=("both",))
    [{'damping': 0.1, 'residuals': 'both'}, {'damping': 1.0, 'residuals': 'both'}]
    """
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


#: Points of every grid.
GRID_SIZE = 6
#: Temperatures of out-of-sample residuals: the default, and what held-out labels of confident networks give.
_TEMPERATURES = (2.0, 3.5)


def _twice(
    cls: type[InfluenceMethod],
    published: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    needs: str | None = None,
    settable: frozenset[str] = frozenset(),
) -> list[MethodSpec]:
    """A gradient method as published, and with out-of-sample residuals."""
    name = cls.__name__
    return [
        MethodSpec(name, adapter(cls), published, needs=needs, settable=settable),
        MethodSpec(
            f"{name}, out-of-sample residuals",
            adapter(cls, residuals="both"),
            ours,
            needs=needs,
            settable=settable,
        ),
    ]


#: The rows that `compare` knows by name.
METHODS: dict[str, MethodSpec] = {
    c.name: c
    for c in (
        MethodSpec("STRIDE", stride()),
        MethodSpec("STRIDE (tuned)", stride(), grid(temperature=_TEMPERATURES, damping=(0.1, 0.3, 1.0))),
        MethodSpec("STRIDE T=1", stride(residuals="training")),
        MethodSpec("STRIDE trained + Lasso", stride(Trained)),
        MethodSpec("STRIDE trained, no linearity", stride(Trained, linearity_weight=0.0)),
        MethodSpec("STRIDE trained, no stability", stride(Trained, stability_weight=0.0)),
        MethodSpec(
            "STRIDE trained, no LDS loss",  # D.3: neither of the two constraints
            stride(Trained, linearity_weight=0.0, stability_weight=0.0),
        ),
        # D.3, "layer sensitivity": the first hidden layer of the MLP, the convolutions of the CNN (Table 2).
        MethodSpec("STRIDE trained, layer1", stride(Trained, layers=["relu1"])),
        MethodSpec("STRIDE trained, conv", stride(Trained, layers=["relu2"])),
        MethodSpec("STRIDE paper (mnist)", stride_paper("mnist")),
        MethodSpec("STRIDE paper (cifar10)", stride_paper("cifar10")),
        *_twice(
            adapters.EKFAC,
            grid(damping=(None, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
            grid(temperature=_TEMPERATURES, damping=(None, 1e-2, 1e-1)),
            needs="kronfluence",
            settable=frozenset({"damping"}),
        ),
        *_twice(
            adapters.DiagonalEKFAC,
            grid(fisher=("sampled", "exact"), damping=(0.1, 0.3, 1.0)),
            grid(temperature=_TEMPERATURES, damping=(0.1, 0.3, 1.0)),
        ),
        *_twice(
            adapters.TRAK,
            grid(damping=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
            grid(temperature=_TEMPERATURES, damping=(0.3, 1.0, 3.0)),
        ),
        *_twice(
            adapters.TracIn,
            ({},),
            grid(residuals=("both", "temperature"), temperature=(*_TEMPERATURES, 5.0)),
        ),
        MethodSpec("TracIn, 4 checkpoints", adapter(adapters.TracIn), n_checkpoints=4),
        MethodSpec("STRIDE, checkpoints", stride(), n_checkpoints="log"),
        MethodSpec("STRIDE, cross-fitted", stride(), partitions=1),
        MethodSpec("KNNShapley", adapter(adapters.KNNShapley), grid(k=(1, 2, 5, 10, 20, 50))),
        MethodSpec("Similarity", adapter(adapters.Similarity)),
        MethodSpec("ClassSimilarity", adapter(adapters.ClassSimilarity)),
        MethodSpec("ClassRandom", adapter(adapters.ClassRandom)),
        MethodSpec("Random", adapter(adapters.Random)),
    )
}
#: Compared unless methods are named. The first row is what the others are compared with.
DEFAULT_METHODS = (
    "STRIDE",
    "STRIDE, checkpoints",
    "STRIDE, cross-fitted",
    "STRIDE (tuned)",
    "STRIDE trained + Lasso",
    "EKFAC",
    "EKFAC, out-of-sample residuals",
    "DiagonalEKFAC",
    "DiagonalEKFAC, out-of-sample residuals",
    "TRAK",
    "TRAK, out-of-sample residuals",
    "TracIn",
    "TracIn, out-of-sample residuals",
    "TracIn, 4 checkpoints",
    "KNNShapley",
    "Similarity",
    "ClassSimilarity",
    "ClassRandom",
    "Random",
)


def find_method(method: str | MethodSpec) -> MethodSpec:
    """A spec by name, or as it is; "X, checkpoints" is the row X with checkpoints along the training, and
    "X, cross-fitted" that with models of two complementary halves.

    Raises:
        ValueError: No such name.
    """
    if isinstance(method, MethodSpec):
        return method
    wanted: dict[str, dict[str, Any]] = {
        "checkpoints": {"n_checkpoints": "log"},
        "cross-fitted": {"partitions": 1},
    }
    row, _, what = method.rpartition(", ")
    if what in wanted and row in METHODS and method not in METHODS:
        return replace(METHODS[row], name=method, **wanted[what])
    if method not in METHODS:
        raise bad_choice("methods", method, list(METHODS))
    return METHODS[method]
