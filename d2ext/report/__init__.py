"""Models side by side: numbers, charts and pictures in one page that needs nothing else."""

from d2ext import compat

compat.require_detectron2()

from d2ext.report.entry import Entry, Speed
from d2ext.report.measures import Measures
from d2ext.report.page import Words, write_numbers, write_report

__all__ = ["Entry", "Measures", "Speed", "Words", "write_numbers", "write_report"]
