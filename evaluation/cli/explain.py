"""`stride-captum explain`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ...errors import bad_value
from ...features.options import Features
from ...influence.checkpoints.checkpoint import load_checkpoint
from ...influence.checkpoints.weight_files import files_like
from ...operators import Operators, operators_of
from ...system.devices import existing_device
from ...system.processes import is_first
from ..comparison.explain import explain
from ..comparison.explained_models import planned_models
from ..report.html import write_explanation
from ..report.terminal import console, show_explanation
from ..tasks.factories import import_factory
from ..tasks.loading import load_task
from .options import (
    AsJSON,
    Data,
    DataRoot,
    Device,
    DryRun,
    Jobs,
    LabelKey,
    LossName,
    Model,
    Out,
    Preset,
    Quiet,
    Store,
    TaskName,
    Training,
)
from .output import Console, one_sentence_errors
from .results import json_object, training_settings, write_results


def explain_command(
    task: TaskName = "digits",
    index: Annotated[list[int] | None, typer.Option(help="Test point; may be repeated.")] = None,
    k: Annotated[int, typer.Option(help="Proponents and opponents of each test point.")] = 8,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    loss: LossName = None,
    model: Model = None,
    training: Training = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File of trained weights, instead of training.")
    ] = None,
    retrainings: Annotated[
        int,
        typer.Option(
            help="Average scores over models trained on the parts of this many random partitions, which "
            "costs as many trainings. More faithful, but explains the training, not one file of weights."
        ),
    ] = 0,
    parts: Annotated[int, typer.Option(help="Parts that the data are split into, for --retrainings.")] = 2,
    train_function: Annotated[
        str | None,
        typer.Option(
            help="How a model of --retrainings is trained, as module:function; function(indices, seed) "
            "returns a network like that of --model. Default: the training of the task."
        ),
    ] = None,
    jobs: Jobs = 1,
    seed: Annotated[int, typer.Option(help="Seed of the training, and of the partitions.")] = 0,
    operators: Annotated[
        str | None,
        typer.Option(
            help="'closed-form', 'trained', or options as JSON, such as '{\"damping\": 0.1}' or "
            '\'{"name": "trained", "rank": 32}\'.'
        ),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Options of the features as JSON, such as '{\"max_width\": 1024}'.")
    ] = None,
    store: Store = Path("out/store"),
    device: Device = "cpu",
    dry_run: DryRun = False,
    out: Out = Path("out/explain"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Train (or load) a model, fit STRIDE and explain test points by their training examples.

    Examples:

        stride-captum explain --task digits --index 3

        stride-captum explain --task mnist --data-root ~/data --checkpoint mlp.pt --index 8 --index 9

        stride-captum explain --task digits --retrainings 2 --dry-run

        torchrun --nproc-per-node 4 -m stride_captum explain --task digits
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(store):
        on = existing_device(device)
        out.mkdir(parents=True, exist_ok=True)  # before the work
        loaded = load_task(
            task,
            preset=preset,
            data_root=data_root,
            data=data,
            model=model,
            training=training_settings(training),
            label_key=label_key,
            loss=loss,
            mix_test=False,
        )
        models: dict[str, Any] = {
            "retrainings": retrainings,
            "parts": parts,
            "train_function": None
            if train_function is None
            else import_factory("train_function", train_function),
            "seed": seed,
            "store": store,
            "device": on,
            "n_jobs": jobs,
        }
        if dry_run:
            said = planned_models(loaded, given=checkpoint is not None, **models)
            voice.results({"trainings": list(said)}, lambda: console.print("\n".join(said)))
            return
        trained = None
        if checkpoint is not None:
            trained = _loaded(loaded.build_model(), checkpoint).to(on)
        explanation, _ = explain(
            loaded,
            indices=index,
            k=k,
            model=trained,
            **models,
            operators=None if operators is None else _operators(operators),
            features=None if features is None else Features.from_dict(json_object("features", features)),
            show_progress=not quiet,
        )
        results = explanation.to_dict()
        images = (loaded.train.tensors[0], loaded.test.tensors[0])
        if is_first():
            results = write_results(out, results, lambda found, path: write_explanation(found, *images, path))
    if is_first():
        voice.results(results, lambda: show_explanation(explanation))
        if explanation.note:
            voice.note(explanation.note)
        if checkpoint is not None and (alike := files_like(checkpoint)):
            files = f"{len(alike)} other file{'s' * (len(alike) > 1)} in {checkpoint.parent}"
            voice.note(
                f"{files} hold weights of the same names. If they are of the same training, "
                f"STRIDE(model, data, checkpoints=along_training({str(checkpoint.parent)!r})) is more "
                "faithful than one of them."
            )
        voice.note(f"Report: {out / 'report.html'}")


def _operators(text: str) -> Operators:
    """Operators by name, or from JSON with their name and options."""
    if not text.lstrip().startswith("{"):
        return operators_of(text.strip())
    options = json_object("operators", text)
    return Operators.from_dict({"name": "closed-form", **options})


def _loaded(model: nn.Module, checkpoint: Path) -> nn.Module:
    try:
        load_checkpoint(model, checkpoint)
    except (pickle.UnpicklingError, EOFError) as error:
        raise bad_value(
            "checkpoint",
            "be a file of weights, as torch.save(model.state_dict(), path) writes it",
            f"{str(checkpoint)!r}, which is none or holds more than weights",
        ) from error
    return model
