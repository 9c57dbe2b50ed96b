import math


def batches(momentum, share):
    return math.ceil(math.log(1 - share) / math.log(1 - momentum))
