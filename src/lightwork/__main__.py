"""`python -m lightwork`."""

import sys

from lightwork.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
