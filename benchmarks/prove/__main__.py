"""`python -m benchmarks.prove`."""

import sys

from benchmarks.prove.proof import main

sys.exit(main())
