"""Instance masks as PNG files, of the size of the picture as shown, in one of two forms:

- one file per image, named like it, whose values are the numbers of the objects (0 is background;
  in a file with a palette 255 is the unlabelled border of PASCAL VOC). Classes: one for all, or by
  a second folder of maps such as VOC's `SegmentationClass`.
- one file per object, not zero where the object is: `<image>/<class>_<number>.png` (or below
  `<image>/masks/`), or `<image>_<class>_<number>.png`; without class in the name: one for all.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2ext.data.check.images import DECODE_ERRORS
from d2ext.data.convert.objects import Annotations, Picture, Shape, image_files, mask_of, shown_size
from d2ext.data.voc_sds.files import CLASSES
from d2ext.errors import UserError

_BORDER = 255
_NUMBERED = re.compile(r"[_\-. ]*(?P<name>.*?)[_\-. ]*(?P<number>\d*)")


def _read(path: Path, size: tuple[int, int], numbers: bool = True) -> tuple[np.ndarray, bool]:
    """Values (height, width), and whether they are indices of a palette."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            if not numbers and mode not in ("1", "L", "P", "I;16", "I"):
                image = image.convert("L")
            values = np.asarray(image).astype(np.int64)
    except DECODE_ERRORS as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise UserError(f"mask {path} cannot be read: {reason}; export it again") from e
    if values.ndim != 2:
        raise UserError(f"mask {path} has mode {mode}; save numbers in one channel (8 or 16 bits)")
    if values.shape != size[::-1]:
        text = (
            f"mask {path} is {values.shape[1]}x{values.shape[0]}, its picture {size[0]}x{size[1]}"
        )
        if values.shape == size:
            text += " as its EXIF orientation turns it"
        raise UserError(f"{text}; export it for the picture as shown")
    return values, mode == "P"


def _by_number(
    path: Path, size: tuple[int, int], class_map: Path | None, classes: Sequence[str], name: str
) -> list[Shape]:
    values, palette = _read(path, size)
    if palette:
        values[values == _BORDER] = 0
    labels = None if class_map is None else _read(class_map, size)[0]
    shapes = []
    for number in np.unique(values[values != 0]).tolist():
        mask = values == number
        place = f"{path} object {number}"
        if labels is not None:
            found = np.unique(labels[mask]).tolist()
            if len(found) > 1 or not 1 <= found[0] <= len(classes):
                raise UserError(
                    f"{place}: has the labels {found[:5]} in {class_map}; it must have one of "
                    f"1 to {len(classes)}"
                )
            name = classes[found[0] - 1]
        shapes.append(Shape(name, place, masks=[mask_of(mask)]))
    return shapes


def _per_object(
    files: Sequence[tuple[Path, str]], size: tuple[int, int], default: str
) -> list[Shape]:
    named = []
    for path, rest in files:
        match = _NUMBERED.fullmatch(rest)
        named.append((int(match["number"] or 0), path, default or match["name"]))
    shapes = []
    for _, path, name in sorted(named):
        if not name:
            raise UserError(f"mask {path} has no class in its name; name the class: --class-name")
        values, _ = _read(path, size, numbers=False)
        shapes.append(Shape(name, str(path), masks=[mask_of(values)]))
    return shapes


def _objects_of(root: Path, stems: Sequence[str]) -> dict[str, list[tuple[Path, str]]]:
    """{stem of an image: (file, what its name says besides)} of one file per object."""
    files: dict[str, list[tuple[Path, str]]] = {stem: [] for stem in stems}
    for path in sorted(root.rglob("*.png")):
        folders = path.relative_to(root).parts[:-1]
        owner = next((f for f in folders if f in files), None)
        if owner is not None:
            files[owner].append((path, path.stem))
            continue
        parts = re.split(r"(?=[_\-. ])", path.stem)
        starts = ("".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))  # the longest first
        owner = next((s for s in starts if s in files), None)
        if owner is not None:
            files[owner].append((path, path.stem[len(owner) :]))
    return files


def read_masks(
    folder: str,
    image_root: str,
    class_maps: str | None = None,
    class_name: str = "",
    classes: Sequence[str] | None = None,
) -> Annotations:
    """Masks of all images of a folder; images without a mask are left out.

    Args:
        folder: of the masks.
        class_maps: folder of maps whose label n is the n-th of `classes`.
        class_name: of all objects.
        classes: default: those of PASCAL VOC if there are class maps, else what is found.

    Raises:
        UserError: one line naming the file of the first mistake.
    """
    root, pictures = Path(folder), Path(image_root)
    if root.resolve() == pictures.resolve():
        raise UserError(f"{folder} cannot hold the images and the masks; move one of them")
    images = [Path(p) for p in image_files(image_root)]
    images = [p for p in images if root.resolve() not in p.resolve().parents]
    stems = {str(p.relative_to(pictures).with_suffix("")): p for p in images}
    if len(stems) < len(images):
        raise UserError(f"{image_root} has images that differ in their endings only; rename one")
    single = {stem for stem in stems if (root / f"{stem}.png").is_file()}
    named = list(classes or CLASSES)
    if single and not (class_maps or class_name):
        raise UserError(
            f"{folder} has a mask per image, which says no class; give --class-maps or --class-name"
        )
    objects = {} if single else _objects_of(root, list(stems))
    found = Annotations([], named if class_maps else None)
    left_out = 0
    for stem, path in tqdm(stems.items(), "masks", unit="", leave=False, disable=None):
        if stem not in single and not objects.get(stem) and not (root / stem).is_dir():
            left_out += 1
            continue
        size = shown_size(str(path))
        if stem in single:
            class_map = Path(class_maps, f"{stem}.png") if class_maps else None
            shapes = _by_number(root / f"{stem}.png", size, class_map, named, class_name)
        else:
            shapes = _per_object(objects[stem], size, class_name)
        found.pictures.append(Picture(str(path), size, shapes))
    if not found.pictures:
        raise UserError(f"{folder} has no PNG file named like an image of {image_root}")
    if left_out:
        found.notes.append(f"{left_out} images have no mask and are left out")
    return found
