"""`python -m progscale`."""

import sys

from progscale.cli import main

sys.exit(main())
