"""Splits a COCO instances file by image, so that each part has its share of every class.

Iterative stratification (Sechidis et al., "On the stratification of multi-label data", 2011): the
rarest class that is left is dealt out first, to the part that lacks most of it. Here groups of
images are dealt out, those that show the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from d2ext.errors import UserError


def _contents(data: dict, groups: np.ndarray) -> np.ndarray:
    """Number of images of every group that show a class, or none in the column before the last; the
    last column counts all. float64 (groups, classes + 2)."""
    index = {image["id"]: i for i, image in enumerate(data["images"])}
    column = {category["id"]: i for i, category in enumerate(data["categories"])}
    shown = np.zeros((len(index), len(column) + 2))
    for annotation in data["annotations"]:
        shown[index[annotation["image_id"]], column[annotation["category_id"]]] = 1
    shown[:, -2] = ~shown.any(1)
    shown[:, -1] = 1
    contents = np.zeros((groups.max() + 1, shown.shape[1]))
    np.add.at(contents, groups, shown)
    return contents


def assign_groups(contents: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each group, int64 (groups,).

    Args:
        contents: (groups, labels + 1): images with each label; the last column counts images.
        shares: of the parts; they add up to 1.
        seed: of the order in which equals are dealt out.
    """
    rng = np.random.default_rng(seed)
    wanted = np.outer(shares, contents.sum(0))
    parts = np.full(len(contents), -1)
    order = rng.permutation(len(contents))
    order = order[np.argsort(-contents[order, -1], kind="stable")]  # large groups first
    while (parts < 0).any():
        left = (contents * (parts < 0)[:, None])[:, :-1].sum(0)
        label = int(np.argmin(np.where(left > 0, left, np.inf)))
        for group in order:
            if parts[group] >= 0 or not contents[group, label]:
                continue
            empty = np.setdiff1d(np.arange(len(shares)), parts)
            few = len(empty) >= (parts < 0).sum()  # the last ones go where there is nothing yet
            lacks = list(zip(wanted[:, label], wanted[:, -1], rng.random(len(shares))))
            part = max(empty if few else range(len(shares)), key=lambda p: lacks[p])
            parts[group] = part
            wanted[part] -= contents[group]
    return parts


def split_coco(
    data: dict, groups: np.ndarray, shares: Mapping[str, float], seed: int = 0
) -> tuple[dict[str, dict], list[str]]:
    """Divide the images of a COCO file.

    Args:
        data: checked; ids stay as they are, and every part lists all categories.
        groups: number of the group of each image; a group is not divided.
        shares: {name of a part: share}, which add up to 1.
        seed: another one gives another split.

    Returns:
        {name: COCO file} and notes, one line each.

    Raises:
        UserError: a part would be empty.
    """
    shares = {name: share for name, share in shares.items() if share > 0}
    parts = assign_groups(_contents(data, groups), list(shares.values()), seed)[groups]
    out, notes = {}, []
    for number, name in enumerate(shares):
        images = [image for image, part in zip(data["images"], parts) if part == number]
        ids = {image["id"] for image in images}
        if not ids:
            raise UserError(
                f"{len(data['images'])} images in {groups.max() + 1} groups of different pictures "
                f"leave none for {name!r}; give it a larger share, add images, or treat all as "
                "different: --ignore-duplicates"
            )
        annotations = [a for a in data["annotations"] if a["image_id"] in ids]
        out[name] = {**data, "images": images, "annotations": annotations}
        present = {a["category_id"] for a in annotations}
        absent = [c["name"] for c in data["categories"] if c["id"] not in present]
        if absent:
            notes.append(f"{name} has no object of {', '.join(absent)}")
    copies = len(groups) - int(groups.max()) - 1
    if copies:
        notes.append(f"{copies} images show the same as others and are in the same part as those")
    return out, notes
