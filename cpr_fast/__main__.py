import sys

from cpr_fast.cli import main

sys.exit(main())
