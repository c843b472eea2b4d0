"""`python -m tinycap.deploy`: the command line."""

import sys

from tinycap.deploy.cli import main


if __name__ == "__main__":
    sys.exit(main())
