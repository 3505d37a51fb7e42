"""``python -m wesam.pretrain``."""

import sys

from wesam.console import guarded
from wesam.pretrain.cli import main

if __name__ == "__main__":
    sys.exit(guarded(main))
