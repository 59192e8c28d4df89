"""`python -m slimnas`: the same as `slimnas`."""

import sys

from slimnas.cli import main

sys.exit(main())
