"""`python -m longclip.cli`, where the command `longclip` is not on the path."""

import sys

from . import main

sys.exit(main())
