"""`python -m megallama` and `torchrun -m megallama` are the command `megallama`."""

import sys

from megallama.cli import main

if __name__ == "__main__":
    sys.exit(main())
