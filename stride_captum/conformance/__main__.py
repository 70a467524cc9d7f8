"""Print the matrix of the methods that ship; the exit code is 1 if one fails."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
