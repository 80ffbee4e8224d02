"""Runs `python -m bench.tables`."""

import sys

from bench.tables.page import main

if __name__ == "__main__":
    sys.exit(main())
