"""A process that makes its cluster again, and another one: python tests/second_cluster.py OTHER_TF_CONFIG"""

import os
import sys
import time

import keras
import numpy as np
import pytest

import tfdist
from tfdist.errors import UserError

strategy = tfdist.from_environment()
with strategy.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=4, verbose=0)
again = tfdist.from_environment()
assert again.tf_strategy is strategy.tf_strategy and repr(again) == repr(strategy)
with again.scope():
    model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=4, verbose=0)
own = os.environ["TF_CONFIG"]
for tf_config, options, what in ((sys.argv[1], {}, "a second one"), (own, {"communication": "ring"}, "other options")):
    os.environ["TF_CONFIG"] = tf_config
    started_s = time.monotonic()
    with pytest.raises(UserError, match=f"one cluster a process, found .*{what}.*; start a new process"):
        tfdist.MultiWorkerMirrored(**options)
    assert time.monotonic() - started_s < 1
print("all is well")
