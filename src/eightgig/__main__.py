"""`python -m eightgig`, the same as `eightgig`."""

import sys

from eightgig.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
