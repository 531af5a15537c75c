"""Who we all are, from the environment. No TensorFlow."""

import os
from collections.abc import Mapping

from tfdist.errors import UserError


def resolve(environ: Mapping[str, str] = os.environ) -> None:
    """None: this process is alone. Raises `UserError` when TF_CONFIG asks for a cluster, which is not there yet."""
    if environ.get("TF_CONFIG"):
        raise UserError(
            "TF_CONFIG: expected none (clusters are not there yet), found one; unset it to train on this machine alone"
        )
