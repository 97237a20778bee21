"""``python -m mixjax`` is the command line."""

import sys

from mixjax.cli import main

sys.exit(main())
