"""What TensorFlow writes when it is imported."""

import contextlib
import logging
import os
import re
import sys
import tempfile


@contextlib.contextmanager
def without_startup_chatter():
    """Importing TensorFlow writes a dozen lines about the build straight to file descriptor 2, which no setting stops.

    Anything else that is written meanwhile comes out afterwards.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.WARNING)  # how each strategy was made
    sys.stderr.flush()
    whole = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(whole, 2)
            os.close(whole)
            caught.seek(0)
            for line in caught:
                if not re.match(rb"[IWE]0000 |WARNING: All log messages before absl::InitializeLog", line):
                    sys.stderr.write(line.decode(errors="replace"))
