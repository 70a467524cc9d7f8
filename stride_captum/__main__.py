"""Owns the console script: it says what to install where the extras are missing."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line of `stride_captum.evaluation`; under torchrun, in its process group.

    `doctor` runs without the extra.
    """
    from .installed import install_command
    from .process_group import group_of_torchrun, started_by_torchrun

    if os.getcwd() not in sys.path:  # as `python -m` does: --data and --model name modules of the user's
        sys.path.insert(0, os.getcwd())
    try:
        from .evaluation.cli import app
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


if __name__ == "__main__":
    main()
