"""`python -m tinycap.deploy`: the command line, also under `accelerate launch -m` and `torchrun -m`."""

import sys

from tinycap.deploy.cli import main


if __name__ == "__main__":
    sys.exit(main())
