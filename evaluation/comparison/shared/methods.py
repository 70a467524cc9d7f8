"""Methods of a comparison: the name of each, how it is built, and its grid of options.

Every gradient baseline is there twice: with the training residuals, as published, and with the out-of-sample
residuals that STRIDE uses. Options are chosen from the grid on the first half of the test points.

Every grid has `GRID_SIZE` points, and holds the default options of the method, so that no method gains from a
larger choice. TracIn as published, the similarities and the controls have nothing to tune, and no grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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

#: Suffix of the gradient baselines with out-of-sample residuals.
OUT_OF_SAMPLE = ", out-of-sample residuals"


@dataclass(frozen=True)
class MethodSpec:
    """A method in a comparison.

    Attributes:
        name: Name of its row.
        build: `build(model, train_dataset, options)` returns the method.
        grid: Option sets to choose from; a single one means that nothing is tuned.
        n_checkpoints: Number of evenly spaced checkpoints along the training, the attributed model last, that
            `build` is given as the option `checkpoints`. 1 gives none; "log" gives those after epochs 1, 2,
            3, 5, 8, 12, 20, ... and the last.
        partitions: Number of partitions of the training set into halves. `build` is given the models of these
            halves as `checkpoints`, behind those along the training if it has any, otherwise in place of the
            attributed model. Each partition costs one training.
        needs: Module of an extra that the method needs.
        settable: Options that can be set on a fitted method, so that a grid over them needs one fit.
        cache_key: Says that the scores depend on this key, the options, the weights and the training set
            alone. None names cached scores by a digest of everything that `build` returns.
        default: Options if no measure chooses from the grid; {} are the defaults of the method.
        named_at_positions: Whether tasks with positions run it only if it is named: it takes minutes there.

    A spec can be called like its `build`.

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
    named_at_positions: bool = False

    def __call__(self, model: Any, data: Any, options: Mapping[str, Any]) -> InfluenceMethod:
        """The method on a model and its training set."""
        return self.build(model, data, options)

    @property
    def uses_model_alone(self) -> bool:
        """Whether it uses the attributed model alone: no checkpoints, and no models of halves."""
        return self.n_checkpoints == 1 and not self.partitions

    def epochs(self, epochs: int) -> list[int]:
        """Epochs before the last after which it needs checkpoints, in a training of so many epochs."""
        if self.n_checkpoints == 1:
            return []
        if self.n_checkpoints == "log":
            return log_epochs(epochs)
        return even_epochs(epochs, self.n_checkpoints - 1)

    @property
    def fewest_epochs(self) -> int:
        """Smallest number of epochs of the training."""
        return 2 if self.n_checkpoints == "log" else self.n_checkpoints

    @property
    def available(self) -> bool:
        """Whether the extra that it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None


def models_needed(methods: Iterable[Any], epochs: int, partitions: int = 0) -> tuple[list[int], int]:
    """Epochs of all checkpoints, and partitions into halves, that some methods are given.

    Args:
        methods: Only a `MethodSpec` is given some.
        epochs: Epochs of the training.
        partitions: Partitions that are needed at least.

    >>> models_needed([MethodSpec("A", lambda *_: None, n_checkpoints="log", partitions=2)], 6)
    ([1, 2, 3, 5], 2)
    """
    specs = [method for method in methods if isinstance(method, MethodSpec)]
    kept = sorted({epoch for spec in specs for epoch in spec.epochs(epochs)})
    return kept, max([partitions, *(spec.partitions for spec in specs)])


def stride(
    operators: type[Operators] = ClosedForm, *, layers: Sequence[str] | None = None, **fixed: Any
) -> Build:
    """Builder of STRIDE with operators of one kind; the options of a grid point are those of the operators.

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
    """Options of the operators, and options of STRIDE itself."""
    own = {name: value for name, value in options.items() if name not in ("checkpoints", "loss")}
    return own, {name: value for name, value in options.items() if name not in own}


def stride_paper(preset: str) -> Build:
    """Builder of STRIDE with the settings of Table 4, and subsets that fit the training set (`fitting`)."""

    def build(model: Any, data: Any, options: Mapping[str, Any]) -> STRIDE:
        own, beside = _apart({**fitting(len(data)), **options})
        return STRIDE(model, data, operators=Trained.paper(preset, **own), **beside)

    return build


def fitting(n_train: int) -> dict[str, Any]:
    """The 50 subsets of 100 of B.2 need 5,000 examples: smaller training sets are split into 50 parts.

    >>> fitting(60_000), fitting(300)
    ({}, {'subsets': Partition(n_subsets=50, size=None)})
    """
    return {} if n_train >= 5_000 else {"subsets": Partition(50)}


def adapter(cls: type[InfluenceMethod], **fixed: Any) -> Build:
    """Builder of a method that is not STRIDE.

    Args:
        cls: Its class.
        **fixed: Options that hold for every grid point.
    """
    return lambda model, data, options: cls(model, data, **{**fixed, **options})


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the values of some options.

    >>> grid(damping=(0.1, 1.0), residuals=("both",))
    [{'damping': 0.1, 'residuals': 'both'}, {'damping': 1.0, 'residuals': 'both'}]
    """
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


#: Points of every grid.
GRID_SIZE = 6
#: Temperatures of out-of-sample residuals: the default, and what matching gives networks that fit their data.
_TEMPERATURES = (2.0, 3.5)
#: Out-of-sample residuals of gradient methods: with the share of a ridge head, which STRIDE's default has,
#: and without it, which is better for EKFAC, DiagonalEKFAC and TRAK on digits.
_RESIDUALS = ("both", "temperature")


def _twice(
    cls: type[InfluenceMethod],
    published: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    needs: str | None = None,
) -> list[MethodSpec]:
    """A gradient method as published, and with out-of-sample residuals."""
    name = cls.__name__
    settable = frozenset({"damping"} & set(published[0]))
    return [
        MethodSpec(name, adapter(cls), published, needs=needs, settable=settable),
        MethodSpec(
            name + OUT_OF_SAMPLE,
            adapter(cls, residuals="both"),
            ours,
            needs=needs,
            settable=settable,
        ),
    ]


#: The methods that `compare` knows by name.
METHODS: dict[str, MethodSpec] = {
    c.name: c
    for c in (
        MethodSpec("STRIDE", stride()),
        MethodSpec("STRIDE (tuned)", stride(), grid(temperature=_TEMPERATURES, damping=(0.1, 0.3, 1.0))),
        MethodSpec("STRIDE T=1", stride(residuals="training")),
        MethodSpec("STRIDE trained + Lasso", stride(Trained), named_at_positions=True),
        MethodSpec("STRIDE trained, no linearity", stride(Trained, linearity_weight=0.0)),
        MethodSpec("STRIDE trained, no stability", stride(Trained, stability_weight=0.0)),
        MethodSpec(
            "STRIDE trained, no LDS loss", stride(Trained, linearity_weight=0.0, stability_weight=0.0)
        ),
        # D.3, "layer sensitivity": the first hidden layer of the MLP, the convolutions of the CNN (Table 2).
        MethodSpec("STRIDE trained, layer1", stride(Trained, layers=["relu1"])),
        MethodSpec("STRIDE trained, conv", stride(Trained, layers=["relu2"])),
        MethodSpec("STRIDE paper (mnist)", stride_paper("mnist")),
        MethodSpec("STRIDE paper (cifar10)", stride_paper("cifar10")),
        *_twice(
            adapters.EKFAC,
            grid(damping=(None, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
            grid(residuals=_RESIDUALS, damping=(None, 1e-4, 1e-2)),
            needs="kronfluence",
        ),
        *_twice(
            adapters.DiagonalEKFAC,
            grid(fisher=("sampled", "exact"), damping=(0.1, 0.3, 1.0)),
            grid(residuals=_RESIDUALS, damping=(0.1, 0.3, 1.0)),
        ),
        *_twice(
            adapters.TRAK,
            grid(damping=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
            grid(residuals=_RESIDUALS, damping=(0.3, 1.0, 3.0)),
        ),
        *_twice(
            adapters.TracIn,
            ({},),
            grid(residuals=_RESIDUALS, temperature=(*_TEMPERATURES, 5.0)),
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
    """A spec by name; a spec is returned unchanged.

    "X, checkpoints" is the method X with checkpoints along the training, "X, cross-fitted" the method X with
    models of two complementary halves, and "X, checkpoints and halves" has both.

    Raises:
        ValueError: There is no such name.
    """
    if isinstance(method, MethodSpec):
        return method
    wanted: dict[str, dict[str, Any]] = {
        "checkpoints": {"n_checkpoints": "log"},
        "cross-fitted": {"partitions": 1},
        "checkpoints and halves": {"n_checkpoints": "log", "partitions": 1},
    }
    row, _, what = method.rpartition(", ")
    if what in wanted and row in METHODS and method not in METHODS:
        return replace(METHODS[row], name=method, **wanted[what])
    if method not in METHODS:
        raise bad_choice("methods", method, list(METHODS))
    return METHODS[method]
