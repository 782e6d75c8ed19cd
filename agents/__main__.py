"""`python -m perennial.agents` is the command `perennial`."""

import sys

from perennial.agents.cli import main

if __name__ == "__main__":
    sys.exit(main())
