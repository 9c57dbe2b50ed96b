"""What learners get wrong, in one sentence each: what you did, and what is right."""

from batchnorm.language import marked

# The formula
SUM_FOR_MEAN = marked("this is the sum: divide by m for the mean")
SUM_FOR_VARIANCE = marked("this is the sum of the squared deviations: divide by m for the variance")
ROOT_FOR_VARIANCE = marked("this is the standard deviation: the variance is its square")
VARIANCE_FOR_ROOT = marked("you divided by the variance instead of its root: x̂ = (x - µ) / √(σ² + ε)")
NOT_CENTERED = marked("you did not subtract the mean: x̂ = (x - µ) / √(σ² + ε)")
SIGN = marked("your sign is reversed: x̂ is positive where x is above the mean")
EPSILON_OUTSIDE = marked("epsilon is outside the root: √(σ² + ε), not √σ² + ε")
EPSILON_FORGOTTEN = marked("epsilon is missing: a channel whose values are all equal would be divided by 0")
UNBIASED_IN_NORMALIZATION = marked(
    "m - 1 instead of m: normalization uses the biased variance of the batch; torch.var is unbiased by default"
)
SQUARES_CANCEL = marked(
    "E[x²] - E[x]² cancels where the mean is large: subtract the mean first, then average the squares"
)
TUTORIALS_NUMBERS = marked("these are the tutorial's numbers: √0.025 is 0.158, not 0.1, so -0.2 becomes -1.26, not -2")
GAMMA_FORGOTTEN = marked("gamma is missing: y = γ x̂ + β")
BETA_FORGOTTEN = marked("beta is missing: y = γ x̂ + β")
GAMMA_AND_BETA_EXCHANGED = marked("gamma and beta are exchanged: gamma scales and beta shifts, y = γ x̂ + β")

# Axes
SAMPLE_STATISTICS = marked(
    "mean over dim 1: that is layer normalization; batch normalization averages over the batch, dim 0"
)
SAMPLES_TAKEN_FOR_CHANNELS = marked(
    "mean over dim 1 leaves a number for every sample, and you subtract it from a channel: average over the batch, dim 0"
)
ONE_MEAN_FOR_ALL = marked("one mean for all values: each channel has its own mean and variance")
MEAN_OVER_BATCH_ONLY = marked("mean over dim 0 only: an image has one statistic per channel over N, H, W")
MEAN_OVER_PIXELS_ONLY = marked(
    "mean over H and W only: that is instance normalization; batch normalization averages over N too"
)
MEAN_OF_A_SAMPLE = marked(
    "mean over C, H and W: that is layer normalization; each channel has its own statistics over N, H, W"
)
GAMMA_ALONG_WIDTH = marked(
    "gamma and beta lie along the width: reshape them to (1, C, 1, 1), since broadcasting begins at the last axis"
)
STATISTICS_ALONG_WIDTH = marked(
    "the statistics lie along the width: keep the averaged dims (keepdim=True), so that they are (1, C, 1, 1)"
)

# Gradients
CONSTANT_STATISTICS = marked(
    "gradient as if mean and variance were constants: both depend on every x, so two more terms belong to dx"
)
NO_PATH_THROUGH_VARIANCE = marked(
    "the path through the variance is missing in dx: every x changes σ², and σ² every output"
)
NO_PATH_THROUGH_MEAN = marked("the path through the mean is missing in dx: every x changes µ, and µ every output")
GAMMA_FORGOTTEN_IN_GRADIENT = marked("gamma is missing in dx: dL/dx̂ = γ · dL/dy")
GRADIENT_NOT_SCALED = marked("dx is not divided by √(σ² + ε): a wider batch has smaller gradients")
GAMMA_GRADIENT_WITH_X = marked("dgamma sums dy · x: it is the normalized value that gamma multiplies, so sum dy · x̂")
GRADIENTS_AVERAGED = marked("you averaged dgamma and dbeta over the batch: gradients of shared parameters add up")
GRADIENTS_EXCHANGED = marked("dgamma and dbeta are exchanged: return dx, dgamma, dbeta")

# State
NO_BUFFERS = marked("your statistics are not in state_dict: register buffers")
BUFFERS_NOT_PERSISTENT = marked("your statistics are not in state_dict: the buffers must be persistent")
STATISTICS_ARE_PARAMETERS = marked("your statistics are parameters, which an optimizer changes: register buffers")
NO_PARAMETERS = marked("gamma and beta are no parameters, so no optimizer learns them: make them nn.Parameter")
GRAPH_KEPT = marked(
    "your statistics hold the autograd graph of every batch, so deepcopy fails and memory grows: update them under no_grad"
)
NORMALIZED_BY_CONSTANTS = marked(
    "you detached the batch statistics that normalize: only the running statistics are without gradients"
)
EVALUATION_BY_BATCH = marked("in eval mode you normalize by the batch: use the running statistics")
EVALUATION_UPDATES = marked("in eval mode you update the running statistics: only training does")
NEVER_UPDATED = marked("your running statistics stay as they were: update them in training")
NORMALIZED_BY_RUNNING = marked("in training you normalize by the running statistics: use those of the batch")

# Running statistics
BIASED_RUNNING_VARIANCE = marked(
    "m instead of m - 1 for the running variance: it estimates the population, so it averages the unbiased variance"
)
MOMENTUM_REVERSED = marked(
    "momentum the other way round (Keras' convention): in PyTorch it is the weight of the new value"
)
NOT_AVERAGED = marked("this is the batch's value alone: the running statistic keeps 1 - momentum of its old value")
OLD_VALUE_KEPT_WHOLE = marked("the old value is not weighed: multiply it by 1 - momentum")
STANDARD_DEVIATION_AVERAGED = marked("you averaged the standard deviation: the running statistic is the variance")
COUNTED_SAMPLES_ONLY = marked("m is not N: every value of the channel counts, m = N · H · W")

# Momentum
STEPS_LIKE_A_LINE = marked(
    "share / momentum: every batch closes a share of what is left, so the rest shrinks by powers of 1 - momentum"
)
TIME_CONSTANT = marked("1 / momentum batches close only 63 % of the way: solve (1 - momentum)ⁿ ≤ 1 - share")
ONE_BATCH_SHORT = marked("one batch short: after that many the share is not reached yet, so round up")
NOT_ROUNDED = marked("a number of batches is whole: round up")
SHARE_OF_THE_OLD = marked("you computed when the old value weighs `share`: it must weigh 1 - share at most")

# Training and evaluation
EVALUATED_BY_BATCH = marked("this is the output in training: eval() normalizes by the running statistics")
EVALUATED_BY_TRUTH = marked(
    "this takes the running statistics as if they had arrived: after one batch they are a tenth of the way"
)
UNBIASED_AFTER_MANY = marked("this is the output in training: the running variance is unbiased, 20/3 and not 5")

# Folding
SCALED_COLUMNS = marked("you scaled the columns of the weight: an output is a row, so multiply by scale[:, None]")
BIAS_NOT_SCALED = marked("the bias is not scaled: batch norm multiplies Wx + b as a whole, so b' = (b - µ) · scale + β")
MEAN_NOT_FOLDED = marked("the running mean is missing: b' = (b - µ) · scale + β")
BETA_SCALED = marked("beta is scaled: it is added after the multiplication, b' = (b - µ) · scale + β")
OLD_BIAS_LOST = marked("the layer's own bias is lost: b' = (b - µ) · scale + β")

# A model
NORM_REMOVED = marked("no batch norm is left: repair the model instead of removing it")
BATCH_OF_ONE = marked(
    "the last batch has one sample, which has no variance: leave it out, or join it to the one before"
)
DEAD_BIAS = marked("the bias of {name} is dead: batch norm subtracts it again and its gradient is 0, so use bias=False")
EVAL_FORGOTTEN = marked(
    "eval() is forgotten: a prediction must not depend on its batch, nor change the running statistics"
)
TRAIN_FORGOTTEN = marked("training runs in eval mode, so the running statistics stay as they are: call train() first")
