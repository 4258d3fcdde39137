"""`python -m benchmarks.report`."""

import sys

from benchmarks.report.documents import main

sys.exit(main())
