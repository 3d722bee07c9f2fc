"""`python -m trt_int8` is `trt-int8`."""

import sys

from trt_int8.cli import main

sys.exit(main())
