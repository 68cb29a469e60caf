"""``python -m lfm2_gpu`` is ``lfm2-gpu``."""

import sys

from lfm2_gpu.cli import main

sys.exit(main())
