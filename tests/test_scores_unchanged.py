"""Scores of every method and option as they were before the files moved; kept until the move is done.

`python tests/test_scores_unchanged.py` records them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import arguments
from planted import MLP, BatchNormCNN, built, planted_classes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm, Partition, Trained, adapters
from stride_captum.conformance.shipped import shipped
from stride_captum.influence.method import InfluenceMethod

FILE = Path(__file__).with_suffix(".safetensors")
Make = Callable[[nn.Module, Any], InfluenceMethod]
NETWORKS = {"mlp": MLP, "cnn": BatchNormCNN}
#: Test points whose scores are kept.
FEW = 2


def stride(**options: Any) -> Make:
    return lambda model, train: STRIDE(model, train, **arguments(**options))


def operators(**options: Any) -> Make:
    few: dict[str, Any] = {"iterations": 8, "n_subsets": 12, "subset_size": 8, "rank": 4, "alpha": 0.3}
    return stride(operators="trained", **{**few, **options})


def held_out(model: nn.Module, train: Any) -> InfluenceMethod:
    x, _ = train.tensors
    other = planted_classes(20, tuple(x.shape[1:]), seed=5)
    return STRIDE(model, train, held_out=TensorDataset(other.tensors[0].double(), other.tensors[1]))


def checkpoints(model: nn.Module, train: Any) -> InfluenceMethod:
    halved = {name: t / 2 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    operators = ClosedForm(residuals="both", temperature=2.0)
    return STRIDE(model, train, checkpoints=[model.state_dict(), halved], operators=operators)


def changed(model: nn.Module, train: Any) -> InfluenceMethod:
    method = STRIDE(model, train).remove_examples([0, 7])
    return method.add_examples(tuple(part[:3] for part in train.tensors))


OPTIONS: dict[str, Make] = {
    **{f"residuals {kind}": stride(residuals=kind) for kind in ("training", "temperature", "leave-one-out")},
    **{
        f"curvature {name}": stride(curvature=name)
        for name in ("identity", "eigenvalue-corrected", "gauss-newton")
    },
    "temperature": stride(temperature=3.0),
    "damping": stride(damping=0.05),
    "head damping": stride(head_damping=0.5),
    "threshold": stride(threshold=0.01),
    "random projection": stride(projection="random", projection_width=4),
    "pca projection": stride(projection="pca", projection_width=4),
    "penultimate": stride(select="penultimate"),
    "max width": stride(max_width=20),
    "held out": held_out,
    "checkpoints": checkpoints,
    "examples come and go": changed,
    "trained": operators(),
    "trained, no linearity": operators(linearity_weight=0.0),
    "trained, no stability": operators(stability_weight=0.0),
    "trained, linearity by example": operators(linearity="example"),
    "trained, own encoders": operators(encoder="per-subset"),
    "trained, representation": operators(steering="representation", select="penultimate"),
    "trained, constant steps": operators(schedule="constant", learning_rate=0.01),
    "trained, small batches": operators(batch_size=4),
    "trained, weights": operators(weight_decay=0.1, fidelity_weight=0.5),
    "trained, sketch": operators(sketch_width=8, sketch_ridge=2.0),
    "trained, partition": operators(subsets="partition"),
    "trained, paper's coverage": operators(subsets="partition", coverage="paper", subset_size=3),
    "trained, ridge": operators(recovery="ridge"),
    "trained, no center": operators(center=False),
    "trained, bic": operators(alpha="bic"),
    "trained, aic": operators(alpha="aic"),
    "trained, cross-validation": operators(alpha="cross-validation"),
    "trained, seed": operators(seed=3),
    "paper": lambda model, train: STRIDE(
        model, train, operators=Trained.paper("mnist", iterations=8, subsets=Partition(8, size=4))
    ),
}
METHODS: dict[str, Make] = {
    **{subject.name: subject.build for subject in shipped()},
    **{
        f"{cls.__name__}, out-of-sample residuals": lambda model, train, cls=cls: cls(
            model, train, residuals="both"
        )
        for cls in (adapters.TracIn, adapters.DiagonalEKFAC, adapters.TRAK)
    },
    **OPTIONS,
}
RESPONSES = ("margin", "logit", "probability", "log-probability", "loss")


def problem(network: str) -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    """A network in float64 with its data; not trained, since training depends on the processor."""
    build = NETWORKS[network]
    train, test = planted_classes(48, build.shape, seed=1), planted_classes(FEW, build.shape, seed=2)
    wide = [TensorDataset(data.tensors[0].double(), data.tensors[1]) for data in (train, test)]
    x, y = wide[1].tensors
    return built(build, 0).double().eval(), wide[0], (x, y)


def answers(network: str, name: str) -> dict[str, Tensor]:
    """What a method says, by question."""
    model, train, test = problem(network)
    method = METHODS[name](model, train)
    found: dict[str, Tensor] = {"scores": method.influence(test)}
    found["self-influence"] = method.self_influence()
    if name in ("STRIDE", "trained"):
        for response in RESPONSES:
            found[response] = method.influence(test, response=response, target="predicted")
        found["target"] = method.influence(test, target=1)
        found["groups"] = method.subset_influence(test, [[0, 1, 2], [7, 9]])
        top = method.influence(test, 3, False)
        found["top"], found["places"] = top.influence_scores, top.indices.double()
    if name == "STRIDE":
        found["cosine"] = method.influence(test, normalize="cosine")
        found["of others"] = method.self_influence(test)
    if name in ("STRIDE", "residuals leave-one-out"):
        found["mislabel scores"] = method.mislabel_scores()
    return {f"{network}, {name}, {what}": values.detach().clone() for what, values in found.items()}


CASES = [
    (network, name)
    for network in NETWORKS
    for name in METHODS
    if network == "mlp" or (name != "EKFAC" and "trained, " not in name)
]


def draws() -> Tensor:
    """What torch draws here: it depends on the instructions that the processor has."""
    return torch.randn(64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def before() -> dict[str, Tensor]:
    found = load_file(FILE)
    if not torch.equal(found["draws"], draws()):
        pytest.skip("torch draws other numbers on this processor than where the scores were recorded")
    return found


@pytest.mark.filterwarnings("ignore:.*training examples are in no subset")
@pytest.mark.parametrize(("network", "name"), CASES)
def test_scores_are_what_they_were(before: dict[str, Tensor], network: str, name: str) -> None:
    for what, values in answers(network, name).items():
        scale = float(before[what].abs().max())
        torch.testing.assert_close(values.to(before[what]), before[what], rtol=0, atol=1e-7 * scale)


if __name__ == "__main__":
    found = {k: v.contiguous() for case in CASES for k, v in answers(*case).items()}
    save_file({"draws": draws(), **found}, FILE)
