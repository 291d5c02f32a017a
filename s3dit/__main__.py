"""`python -m s3dit` is the command line."""

import sys

from s3dit.cli import main

sys.exit(main())
