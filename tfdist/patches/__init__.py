"""The only folder that touches private names of Keras and TensorFlow. One small entry each: what, why, upstream, versions.

Nothing here runs at import; callers apply an entry where they need it.
"""

import keras
import tensorflow as tf

from tfdist.errors import UserError

# which the entries are tested with
VERSIONS = {"Keras": ((3, 10), (3, 15)), "TensorFlow": ((2, 19), (2, 21))}


def check_versions(what: str) -> None:
    """Raises `UserError` where private names may mean something else than what an entry says."""
    for name, found in (("Keras", keras.__version__), ("TensorFlow", tf.__version__)):
        low, high = VERSIONS[name]
        if not low <= tuple(int(part) for part in found.split(".")[:2]) <= high:
            raise UserError(
                f"{what}: expected {name} {low[0]}.{low[1]} to {high[0]}.{high[1]}, whose private names it replaces, found "
                f"{found}; install one of these, or use tfdist.Trainer"
            )
