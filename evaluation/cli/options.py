"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..tasks.built_in import TASKS
from ..tasks.loading import PRESETS
from . import completion

TaskName = Annotated[
    str,
    typer.Option("--task", help="One of: " + ", ".join(TASKS) + ".", autocompletion=completion.tasks),
]
Preset = Annotated[
    str,
    typer.Option(help="Size of the task: " + ", ".join(PRESETS) + ".", autocompletion=completion.presets),
]
Models = Annotated[
    int | None, typer.Option(help="Attributed models [3; for flipped labels and leaked examples 1].")
]
Out = Annotated[Path, typer.Option(help="Folder for report.html and results.json.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of MNIST or CIFAR-10 in torchvision's layout.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Your own data set, as module:factory; factory(train=True) and factory(train=False) return a "
        "data set of (input, label), or of dicts with one input and 'labels' or 'label'. With --data-root it "
        "is called factory(DIR, train=...)."
    ),
]
LabelKey = Annotated[
    str | None, typer.Option(help="Key of the label in --data of dicts, where it is another one.")
]
Device = Annotated[
    str,
    typer.Option(
        help="Where models are trained and methods are run: cpu, cuda, cuda:1 or mps.",
        autocompletion=completion.devices,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that was started in --out, as it was asked.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained; stop.")]
Yes = Annotated[bool, typer.Option("--yes", help="Go on where it takes more than two hours.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Your own network, as module:factory; factory() returns it untrained. It gives logits "
        "(n, n_classes), or one logit for two classes."
    ),
]
Training = Annotated[
    str | None,
    typer.Option(help='How models are trained, as JSON: \'{"epochs": 40, "learning_rate": 0.01}\'.'),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the results as JSON; all else goes to stderr.")]
