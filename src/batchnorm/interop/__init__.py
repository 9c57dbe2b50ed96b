"""Converts batch norms from and to other libraries: their numbers and their conventions.

| library | momentum is the weight of | running variance | channel axis | names |
|---|---|---|---|---|
| this one, PyTorch | the new value | unbiased | 1 | weight, bias, running_mean, running_var |
| Keras | the old value | biased | -1 | gamma, beta, moving_mean, moving_variance |
| Flax (linen, nnx) | the old value | biased | -1 | scale, bias; mean, var |
| Haiku | the old value | biased, its average corrected for its start at 0 | -1 | scale, offset; mean_ema, var_ema |
| ONNX | the old value | biased | 1 | scale, B, input_mean, input_var |
| the tutorial | the new value | biased | 1 | gamma, beta, running_mean, running_var |

`from_...` builds a `BatchNorm` with the conventions of the other library; `to_...` returns the arguments and arrays for a layer of the
other library. Numbers do not change in either direction, so a round trip is exact to the last bit. Only onnx is imported.
"""

from batchnorm.interop.flax import FlaxBatchNorm, from_flax, to_flax
from batchnorm.interop.haiku import HaikuBatchNorm, from_haiku, to_haiku
from batchnorm.interop.keras import KerasBatchNorm, from_keras, to_keras
from batchnorm.interop.onnx import OnnxBatchNorm, from_onnx, to_onnx
from batchnorm.interop.tutorial import from_tutorial, to_tutorial

__all__ = [
    "FlaxBatchNorm",
    "HaikuBatchNorm",
    "KerasBatchNorm",
    "OnnxBatchNorm",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_onnx",
    "from_tutorial",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_onnx",
    "to_tutorial",
]
