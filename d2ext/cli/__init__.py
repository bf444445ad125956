"""The commands of `d2ext`, one module each; scripts in `tools/` and `demo/` run them too."""

from d2ext import compat

compat.require_detectron2()
