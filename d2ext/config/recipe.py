"""The yaml keys of recipes: configs that fit their numbers to the data, by `d2ext.engine.recipe`.

The lazy twin is a group `recipe` with the same names in lower case, see `configs/common/recipe.py`.
"""

from detectron2.config import CfgNode


def add_recipe_config(cfg: CfgNode) -> None:
    """Add `RECIPE`; other configs leave it disabled."""
    cfg.RECIPE = recipe = CfgNode()
    # Whether rules set size, anchors, batch, rate, length and evaluations when a training starts.
    recipe.ENABLED = False
    # Times that every image is seen, within these numbers of iterations at least and at most.
    recipe.EPOCHS = 64.0
    recipe.ITERATIONS = [300, 2000]
    # Short side of the images: 0 for that at which a quarter of the objects are smaller than
    # OBJECT_SIZE (pixels, square root of the box's area), within SHORT_SIDE.
    recipe.IMAGE_SIZE = 0
    recipe.OBJECT_SIZE = 32.0
    recipe.SHORT_SIDE = [128, 320]
    # Of that short side, what training images are resized to, one at random.
    recipe.TRAIN_SCALES = [0.5, 0.75, 1.0, 1.25]
    # Anchors: "fit" to the boxes, or "keep" those that the weights know, unless objects lie far
    # outside.
    recipe.ANCHORS = "fit"
    # Images of an iteration on a CPU, and at most on a GPU; there MEMORY counts: GiB of network and
    # optimiser, and of each megapixel of an image.
    recipe.BATCH = 2
    recipe.MEMORY = [0.5, 1.0]
    # Learning rate, and the number of images of an iteration that it is for.
    recipe.RATE = [0.001, 2.0]
    # Evaluations during the training, and how many without a better one end it.
    recipe.EVALUATIONS = 10
    recipe.PATIENCE = 5
    # What the rules have set, as overrides; filled in by the training.
    recipe.APPLIED = []
