"""Console script: it says what to install where the extras are missing."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line of `stride_captum.evaluation`; under torchrun, in its process group.

    `doctor` runs without the extra.
    """
    from .system.packages import install_command
    from .system.processes import group_of_torchrun, started_by_torchrun

    _current_folder_last()
    try:
        from .evaluation.cli.app import app
    except ModuleNotFoundError as error:
        if sys.argv[1:2] == ["doctor"]:
            from .doctor import main as doctor

            sys.exit(doctor(sys.argv[2:]))
        sys.exit(f"The command line needs {error.name}: {install_command('eval')}")
    if started_by_torchrun() and sys.argv[1:2] != ["explain"]:
        said = "Only `explain` runs under torchrun. Retrainings use --jobs, or a cluster through joblib."
        sys.exit(said if os.environ["RANK"] == "0" else 1)
    with group_of_torchrun():
        app()


def _current_folder_last() -> None:
    """Let --data and --model find modules of the current folder, after all that is installed."""
    here = os.path.realpath(os.getcwd())
    installed = [path for path in sys.path if path and os.path.realpath(path) != here]
    sys.path[:] = [*installed, os.getcwd()]


if __name__ == "__main__":
    main()
