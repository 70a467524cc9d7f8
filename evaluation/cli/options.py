"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...losses.named import LOSSES
from ..tasks.built_in import TASKS
from ..tasks.loading import PRESETS
from . import completion

TaskName = Annotated[
    str,
    typer.Option("--task", help="One of: " + ", ".join(TASKS) + ".", autocompletion=completion.one_of(TASKS)),
]
Preset = Annotated[
    str,
    typer.Option(
        help="Size of the task: " + ", ".join(PRESETS) + ".", autocompletion=completion.one_of(PRESETS)
    ),
]
Models = Annotated[
    int | None,
    typer.Option(help="Attributed models, whose predictions are explained [3; mislabel and leakage 1]."),
]
Store = Annotated[Path, typer.Option(help="Folder of trained models: what is there is not trained again.")]
Jobs = Annotated[int, typer.Option(help="Processes for the retrainings; -1 takes all cores.")]
Repeats = Annotated[int, typer.Option(help="Timed repetitions; medians are reported.")]
Out = Annotated[Path, typer.Option(help="Folder for report.html and results.json.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of MNIST or CIFAR-10 in torchvision's layout.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Your own data set, as module:factory; factory(train=True) and factory(train=False) return a "
        "data set of (input, label), or of dicts with one input and 'labels' or 'label'. With --data-root "
        "DIR the calls are factory(DIR, train=...)."
    ),
]
LabelKey = Annotated[
    str | None, typer.Option(help="Key of the label if examples of --data are dicts [labels or label].")
]
LossName = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="What networks are trained with on --data: " + ", ".join(LOSSES) + " [cross_entropy].",
        autocompletion=completion.one_of(LOSSES),
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where models are trained and methods are run: cpu, cuda, cuda:1 or mps.",
        autocompletion=completion.devices,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run that was started in --out, with its arguments.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")]
Yes = Annotated[bool, typer.Option("--yes", help="Run even if it takes more than two hours.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Your own network, as module:factory; factory() returns it untrained. It returns logits "
        "(n, n_classes), one logit for two classes, or what --loss takes; (n, P, C) and (n, C, H, W) are the "
        "outputs of several positions."
    ),
]
Training = Annotated[
    str | None,
    typer.Option(help='How models are trained, as JSON: \'{"epochs": 40, "learning_rate": 0.01}\'.'),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the results as JSON; all else goes to stderr.")]
