"""``python -m wesam`` is the command ``wesam``."""

import sys

from wesam.cli import main

sys.exit(main())
