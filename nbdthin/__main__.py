"""`python -m nbdthin` is `nbdthin`."""

import sys

from nbdthin.cli import main

sys.exit(main())
