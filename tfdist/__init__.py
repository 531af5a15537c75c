"""tfdist: distributed training for TensorFlow and Keras 3 that gives the same answer on one device and on many.

The names below are loaded on first use: `import tfdist` does not import TensorFlow.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "OneDevice": "tfdist.strategies.sync",
    "Mirrored": "tfdist.strategies.sync",
    "MultiWorkerMirrored": "tfdist.strategies.sync",
    "ParameterServer": "tfdist.strategies.parameter_server",
    "TPU": "tfdist.strategies.select",
    "from_environment": "tfdist.strategies.select",
    "InputContext": "tfdist.strategies.base",
    "Trainer": "tfdist.train.trainer",
    "Config": "tfdist.config",
    "verify": "tfdist.verification.run",
}
_MODULES = {"fit": "tfdist.fit", "actions": "tfdist.train.actions", "models": "tfdist.models", "errors": "tfdist.errors"}
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'tfdist' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
