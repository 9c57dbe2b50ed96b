import math


def batches(momentum, share):
    raise NotImplementedError
