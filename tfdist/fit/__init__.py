"""Keras `fit` on every strategy. Importing this is what makes models under a tfdist scope train that way."""

from tfdist.fit import adapter as adapter
