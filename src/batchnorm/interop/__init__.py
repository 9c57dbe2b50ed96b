"""Batch norms of other libraries: their numbers and their conventions, in and out.

| library | momentum weighs | running variance | channel axis | names |
|---|---|---|---|---|
| here, PyTorch | the new batch | unbiased | 1 | weight, bias, running_mean, running_var |
| Keras | what was | biased | -1 | gamma, beta, moving_mean, moving_variance |
| Flax (linen, nnx) | what was | biased | -1 | scale, bias; mean, var |
| Haiku | what was | biased, its average corrected for its start at 0 | -1 | scale, offset; mean_ema, var_ema |
| ONNX | what was | biased | 1 | scale, B, input_mean, input_var |
| the tutorial | the new batch | biased | 1 | gamma, beta, running_mean, running_var |

`from_...` builds a `BatchNorm` that goes on in the other library's way; `to_...` returns what the other library is built and filled with.
Numbers pass unchanged in both directions, so a round trip is exact to the last bit. None of the libraries is imported, but onnx.
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
