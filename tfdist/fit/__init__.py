"""Keras `fit` on every strategy: importing this is what makes models under a tfdist scope train that way."""

from tfdist.fit.adapter import models_made_here as models_made_here
from tfdist.fit.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
