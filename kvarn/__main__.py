"""`python -m kvarn`: the command `kvarn`."""

import sys

from kvarn.cli.main import main

sys.exit(main())
