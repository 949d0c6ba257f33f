"""`python -m progscale.cli`."""

import sys

from progscale.cli import main

sys.exit(main())
