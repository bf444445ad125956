"""Learning rate schedules, in iterations; the length is that of `train.max_iter`."""

from d2ext.solver import warmup_cosine, warmup_multistep

from detectron2.config import LazyCall as L

# detectron2's schedules at 16 images per iteration.
lr_1x = L(warmup_multistep)(
    max_iter="${train.max_iter}", milestones=[60000, 80000], warmup_iters=1000, warmup_factor=0.001
)
lr_3x = L(warmup_multistep)(
    max_iter="${train.max_iter}",
    milestones=[210000, 250000],
    warmup_iters=1000,
    warmup_factor=0.001,
)
# MMDetection's 3x: 36 epochs of 7330 iterations, steps after 27 and 33.
lr_36_epochs = L(warmup_multistep)(
    max_iter="${train.max_iter}",
    milestones=[197910, 241890],
    warmup_iters=1000,
    warmup_factor=0.001,
)
# Half a cosine down to a hundredth of the base rate, for short runs.
lr_cosine = L(warmup_cosine)(
    max_iter="${train.max_iter}", end=0.01, warmup_iters=50, warmup_factor=0.1
)
