"""`python -m mrlm_cli` and the `mrlm` script."""

import sys

from mrlm_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
