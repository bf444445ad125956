"""Networks as programs: `torch.export` and ONNX, with everything up to boxes, scores and masks."""

from d2ext import compat

compat.require_detectron2()

from d2ext.export.build import build_form
from d2ext.export.drawing import register_drawing
from d2ext.export.forms import ExportForm, register_form
from d2ext.export.programs import export_onnx, export_program
from d2ext.export.structures import Corners, Detections, Inputs, refuse

__all__ = [
    "Corners",
    "Detections",
    "ExportForm",
    "Inputs",
    "build_form",
    "export_onnx",
    "export_program",
    "refuse",
    "register_drawing",
    "register_form",
]
