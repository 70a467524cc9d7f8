"""Owns the console script: it says what to install where the extras are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of `stride_captum.evaluation`; `doctor` runs without its extra."""
    try:
        from .evaluation.cli import app
    except ModuleNotFoundError as error:
        if sys.argv[1:2] == ["doctor"]:
            from .doctor import main as doctor

            sys.exit(doctor(sys.argv[2:]))
        sys.exit(f'The command line needs {error.name}: pip install "stride-captum[eval]"')
    app()


if __name__ == "__main__":
    main()
