"""Runs the command line: `python -m cpr_fast COMMAND ...` is the same as `cpr-fast COMMAND ...`."""

import sys

from cpr_fast.cli import main

sys.exit(main())
