"""What type checkers know of the public names, which are imported on first use. pyright checks it, nothing runs it."""

from typing import assert_type

import torch

import batchnorm as bn

x = torch.ones(2, 3)
assert_type(bn.BatchNorm2d(3), bn.BatchNorm2d)
assert_type(bn.functional.batch_norm(x, None, None, training=True), torch.Tensor)
assert_type(bn.explain([1.0, 2.0]), bn.Explanation)
assert_type(bn.fold(torch.nn.Identity(), x), tuple[torch.nn.Module, bn.FoldReport])
assert_type(bn.unfold(torch.nn.Identity()), torch.nn.Module)
assert_type(bn.statistics.Ghost(2), bn.statistics.Ghost)
assert_type(bn.errors.InputError("values"), bn.errors.InputError)
