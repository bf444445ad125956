"""Four commands, without Python and without editing a config: from a folder of labelme to numbers
and pictures, as docs/first_20_photos.md has them."""

import json

import numpy as np
from PIL import Image

from tests.data.convert.helpers import photo

D2EXT = "d2ext/__main__.py"
BOXES = {"cell": (6, 8, 30, 30), "leaf": (34, 10, 60, 44)}


def write_photos(folder, count):
    """Pictures that differ, with two objects each, and labelme's file beside every one."""
    folder.mkdir()
    for number in range(count):
        name = f"{number}.png"
        image = photo(number)
        shapes = []
        for label, (x0, y0, x1, y1) in BOXES.items():
            image[y0:y1, x0:x1] = (250, 30, 30) if label == "cell" else (20, 220, 60)
            points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
            shapes.append({"label": label, "points": points, "shape_type": "polygon"})
        Image.fromarray(np.ascontiguousarray(image)).save(folder / name)
        data = {"version": "5.4.1", "shapes": shapes, "imagePath": name}
        data |= {"imageHeight": image.shape[0], "imageWidth": image.shape[1]}
        (folder / f"{number}.json").write_text(json.dumps(data))


def test_four_commands_lead_from_labelme_to_numbers_and_pictures(run_scripts, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 6)
    split, my = tmp_path / "split", f"{photos}"
    convert = ["labelme", photos, "--output", tmp_path / "my.json"]
    shares = ["--output", split, "--shares", "0.67", "0.33", "0"]
    run_scripts(
        [D2EXT, "convert", *convert],
        [D2EXT, "split", tmp_path / "my.json", "--images", photos, *shares],
        [D2EXT, "train", "mask_rcnn_tiny_finetune", "--data", split, f"OUTPUT_DIR={out}"]
        + ["--epochs", "3", "--image-size", "64"],
        [
            "tools/visualize_results.py",
            "--results",
            out / "inference/split_val/coco_instances_results.json",
            "--register",
            f"val={split}/val.json,{my}",
        ]
        + ["--output-dir", tmp_path / "pictures", "--confidence-threshold", "0"],
    )
    lines = (out / "metrics.json").read_text().splitlines()
    assert any("segm/AP" in json.loads(line) for line in lines)
    log = (out / "log.txt").read_text()
    assert "recipe: SOLVER.MAX_ITER=6: 3 epochs x 4 images / 2 = 6 [you]" in log
    assert "with other 2 images it would be" in log
    assert (out / "model_best.pth").is_file() and (out / "model_final.pth").is_file()
    assert len(list((tmp_path / "pictures").iterdir())) == 2
