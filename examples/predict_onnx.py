"""Predict with an exported model; needs numpy, Pillow and onnxruntime, and nothing else.

python predict_onnx.py model.onnx photo.jpg picture.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

path, photo, output = sys.argv[1:4]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
texts = session.get_modelmeta().custom_metadata_map
about = {k[6:]: json.loads(v) for k, v in texts.items() if k.startswith("d2ext.")}

image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
width, height = image.size
scale = min(about["short_edge"] / min(image.size), about["max_size"] / max(image.size))
small = image.resize([int(side * scale + 0.5) for side in image.size], Image.Resampling.BILINEAR)
pixels = np.asarray(small, np.float32)
if about["channel_order"] == "BGR":
    pixels = pixels[:, :, ::-1]
inputs = {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1))}
inputs["output_size"] = np.array([height, width])
names = ["boxes", "scores", "classes", "masks"]
found = zip(*session.run(names, inputs))

draw = ImageDraw.Draw(image)
for number, (box, score, label, mask) in enumerate(x for x in found if x[1] >= 0.5):
    x1, y1, x2, y2 = np.clip(box.round(), 0, [width, height] * 2).astype(int).tolist()
    size = max(x2 - x1, 1), max(y2 - y1, 1)
    inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR))
    inside = Image.fromarray((inside >= about["mask_threshold"]).astype(np.uint8) * 128)
    color = tuple(int(c) for c in np.random.default_rng(number).integers(64, 256, 3))
    image.paste(color, (x1, y1), inside)
    draw.text((x1, y1), f"{about['class_names'][label]} {score:.2f}", color)
    print(f"{about['class_names'][label]} {score:.2f}: {x1} {y1} {x2} {y2}")
image.save(output)
