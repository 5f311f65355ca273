"""`python -m megapar` is `megapar`."""

import sys

from megapar.cli import main

sys.exit(main())
