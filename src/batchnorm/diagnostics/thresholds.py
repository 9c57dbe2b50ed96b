"""The thresholds of all rules in one table, each between what sick and healthy networks measured, and where it comes from.

The ranges are those of 56 networks with one fault each and 25 healthy ones, small and trained to the end on digits and synthetic data.
"""

DRIFT_ERROR = 0.1  # nats, mean over channels; settled networks have 2e-5 to .008, sick ones .02 to 3.3
DRIFT_SUSPECT = 0.012  # between those; a warning only if the loss confirms it
LOG_RATIO_SUSPECT = 0.05  # mean log ratio of deviations: a shift that all channels share hardly changes the divergence
LOSS_RATIO = 1.5  # loss by running over loss by recalibrated statistics; 1.0 to 1.25 healthy, 2 to 8 sick
EXPLAINED = 0.8  # of what recalibrating all layers brings back: the other layers inherit the fault
INITIAL_SHARE = 0.05  # weight of the initial values in the running statistics; 0 after training, .66 to .81 sick
MOSTLY_INITIAL = 0.5  # seven batches with momentum .1
MOMENTUM = 0.5  # a new batch outweighs all before it
EPS = 0.02  # the largest eps in use is 1e-3 (Keras, EfficientNet)
EPS_SHARE = 0.5  # share of channels with a variance below eps; 1 sick, 0 healthy
CONSTANT = 1e-6  # of eps: a smaller variance is that of a constant channel, which no eps would help
DEAD_VARIANCE = 1e-5  # in training; MobileNetV3, with eps 1e-3, starts with channels below eps
DEAD_SHARE = 0.25  # share of channels that are constant in every batch; .5 sick, up to .19 healthy
FEW_SAMPLES_ERROR = 4.0  # effective samples per channel; 1.8 to 12 sick, 35 to 734 healthy
FEW_SAMPLES = 16.0
TAIL = 0.15  # effective samples of the last batch over those of the others; .018 sick, .42 healthy
TAIL_LOSS = 1.05  # loss by running statistics that end with a small batch over that without it; 1.054 for 2 of 64 rows
PADDING = 0.1  # share of constant ragged tails in the values; .76 sick, up to .02 healthy
ORDERED = 5.0  # deviations sqrt(2 / (B - 1)) by which F exceeds 1, so F > 6 for 3 batches; F of 2.5 to 8100 sick, up to 1.35 healthy
LEAK = 1.1  # loss of batches dealt anew over that of the loader's; 1.21 sick, 1.01 healthy
LEAK_DIFFERENCE = 0.025  # of losses: a network that learned a few batches by heart prefers them by .023
SHARED = 0.1  # nats between two calls of a layer in one forward; 9 sick, 0 healthy
DROPOUT = 0.05  # log ratio of standard deviations without and with dropout; .123 sick, 0 healthy
MATES = 1e-3  # relative change of an output with other samples in its batch; .05 to .07 sick, exactly 0 healthy
CANCELLATION = 0.1  # largest |mean| / deviation times the precision of the dtype; 1.5 sick, .008 healthy
KERNEL = 2e-3  # error of torch's kernel for channels_last, in deviations; 1e-2 sick, 1e-7 healthy
ACCUMULATION = 4  # updates of running statistics per optimizer step; 16 sick, 1 healthy
COPY_DISTANCE = 10.0  # distance of buffers over that of parameters; 469 sick, 0 healthy
COPY_OUTPUT = 1e-3  # relative difference of the outputs of a folded model
DETACHED = 0.01  # |sum of dx| over sum of |dx|; .23 sick, 2e-8 healthy
POSITIONS = 0.01  # share of the output's variance between positions with a random pattern; 0 sick, .5 healthy
ANGLE = 0.1  # radians that one update turns a weight; .30 sick, .027 healthy
ANGLE_OF_NEW = 1.0  # in layers without a batch yet; MNASNet has .23 before its first step with a rate of .001
EXPLOSION = 1e3  # gradient at the first over that at the last of at least ten norms
BATCHES = 64  # batches that are read; the divergence of a batch from their pool is then off by 2 %
KEPT_BYTES = 256 * 2**20  # of items, for measurements that need more than one pass
