"""`python -m cauc_dist` is `cauc`."""

import sys

from cauc_dist.cli import main

sys.exit(main())
