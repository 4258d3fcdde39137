"""`python -m benchmarks.roofline`."""

import sys

from benchmarks.roofline.measure import main

sys.exit(main())
