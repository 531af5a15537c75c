"""The command line."""

import os

STARTED_BY = os.getppid()  # now: who ends while the rest is imported is to be missed
