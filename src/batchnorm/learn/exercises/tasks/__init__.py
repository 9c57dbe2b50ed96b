"""The ten tasks, a file each."""

from batchnorm.learn.exercises.task import Task
from batchnorm.learn.exercises.tasks import (
    backward,
    buffers,
    fold,
    forward,
    four_numbers,
    images,
    momentum,
    predict,
    repair,
    running_variance,
)

TASKS: dict[int, Task] = {
    each.TASK.number: each.TASK
    for each in (
        four_numbers,
        forward,
        backward,
        buffers,
        images,
        running_variance,
        momentum,
        predict,
        fold,
        repair,
    )
}
