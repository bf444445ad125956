"""`tools/train_net.py` in double precision, in which no rounding chooses another region."""

import runpy
from pathlib import Path

import torch
import torchvision

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # by which models leave half precision
_nms = torchvision.ops.boxes.nms
# detectron2's `batched_nms` makes its boxes single, and torchvision wants boxes and scores alike.
torchvision.ops.boxes.nms = lambda boxes, scores, iou: _nms(boxes.to(scores.dtype), scores, iou)
script = Path(__file__).resolve().parents[2] / "tools/train_net.py"
runpy.run_path(str(script), run_name="__main__")
