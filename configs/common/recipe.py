"""Recipes: bounds and wishes of the rules that fit a training to its data.

The keys are explained in d2ext/config/recipe.py, the rules in docs/configs.md. The numbers of the
rest of a recipe's config are where the rules start from.
"""

from d2ext.solver import warmup_cosine

from detectron2.config import LazyCall as L

# A tiny network on a CPU.
tiny = dict(
    enabled=True,
    epochs=64.0,
    iterations=[300, 2000],
    image_size=0,
    object_size=32.0,
    short_side=[128, 320],
    train_scales=[0.5, 0.75, 1.0, 1.25],
    anchors="fit",
    batch=2,
    memory=[0.5, 1.0],
    rate=[1e-3, 2.0],
    evaluations=10,
    patience=5,
    applied=[],
)

# ResNet-50 on one GPU of 8 GB, from weights of COCO. Training memory of Mask R-CNN R-50-FPN in
# detectron2's model zoo: 3.4 GB for two images of about 1.07 megapixels.
r50 = dict(
    enabled=True,
    epochs=64.0,
    iterations=[1000, 20000],
    image_size=0,
    object_size=32.0,
    short_side=[480, 800],
    train_scales=[0.8, 0.9, 1.0],
    anchors="keep",
    batch=4,
    memory=[1.0, 1.2],
    rate=[0.02, 16.0],
    evaluations=10,
    patience=5,
    applied=[],
)

# Half a cosine down to a hundredth of the base rate.
lr_r50 = L(warmup_cosine)(
    max_iter="${train.max_iter}", end=0.01, warmup_iters=1000, warmup_factor=0.001
)
