"""Every adaptation of detectron2 v0.6 to today's Python stack; no other module patches anything.

Two phases. `install` runs at `import d2ext`: it is cheap, imports only `detectron2`
itself and makes its sub-packages importable. The `patch_*` functions import detectron2 modules in
order to adapt them, so each is called by the `d2ext` sub-package that uses those modules.

Rules: probe the feature, never the version (v0.6 and upstream main both report `0.6`); where the
probe says that nothing is missing, nothing is touched, so on upstream main `applied` stays
empty.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import random
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

_APPLIED = []

_MISSING_DETECTRON2 = (
    "d2ext needs detectron2, which is not installed in this Python environment; "
    "run `make install` in a checkout of this repository, or install detectron2 v0.6 or newer "
    "yourself"
)


def applied() -> tuple[str, ...]:
    """Names of the adaptations in force, in the order in which they were applied."""
    return tuple(_APPLIED)


def _adaptation(function: Callable[[], bool]) -> Callable[[], None]:
    """Run `function` at most once and record its name if it reports that it changed something."""
    state = {"done": False}

    @functools.wraps(function)
    def run() -> None:
        if not state["done"]:
            if function():
                _APPLIED.append(function.__name__.lstrip("_"))
            state["done"] = True

    return run


def _detectron2_folder() -> Path | None:
    """Where detectron2 lies; `None` if it is absent. Imports nothing.

    Beside a checkout of detectron2, Python takes its outer folder for a namespace package of that
    name, which has no origin and is none.
    """
    spec = importlib.util.find_spec("detectron2")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _source_matches(relative_path: str, pattern: str) -> bool:
    """Whether a file of detectron2 contains `pattern`; reads the source, imports nothing."""
    path = _detectron2_folder() / relative_path
    return path.is_file() and re.search(pattern, path.read_text(encoding="utf-8")) is not None


def has_compiled_detectron2() -> bool:
    """Whether detectron2's own C++ extension is there (its fast COCO evaluation needs it)."""
    module = sys.modules.get("detectron2._C")
    if module is not None:
        return not getattr(module, "__d2ext_stub__", False)
    return _detectron2_folder() is not None and bool(importlib.util.find_spec("detectron2._C"))


def require_detectron2() -> None:
    """Raise `ImportError` with a one-line remedy if detectron2 cannot be found."""
    if _detectron2_folder() is None:
        raise ImportError(_MISSING_DETECTRON2)


# -------------------------------------------------------------------------------------------------
# Phase 1: at `import d2ext`


class _StubExtension(types.ModuleType):
    """Stands in for `detectron2._C`: importable; explains itself when a compiled op is called."""

    __d2ext_stub__ = True

    def __getattr__(self, name):
        if name.startswith("__"):  # copy, inspect and importlib probe for these
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"detectron2._C.{name} needs a compiled detectron2")

        return missing


@_adaptation
def _stub_extension() -> bool:
    """`ImportError: cannot import name '_C' from 'detectron2'` in layers and modeling."""
    # Upstream main guards the import; a stub would hide the absence of _C from it.
    unguarded = _source_matches("layers/deform_conv.py", r"(?m)^from detectron2 import _C\b")
    if has_compiled_detectron2() or not unguarded:
        return False
    import detectron2

    stub = _StubExtension("detectron2._C")
    stub.__file__ = str(_detectron2_folder() / "_C")
    stub.__spec__ = importlib.machinery.ModuleSpec("detectron2._C", None)
    stub.get_compiler_version = lambda: "not compiled"
    stub.get_cuda_version = lambda: "not available"
    stub.has_cuda = lambda: False
    sys.modules["detectron2._C"] = stub
    detectron2._C = stub
    return True


@_adaptation
def _pillow_linear() -> bool:
    """`AttributeError: module 'PIL.Image' has no attribute 'LINEAR'` in the transforms."""
    import PIL.Image

    used = _source_matches("data/transforms/transform.py", r"\bImage\.LINEAR\b")
    if hasattr(PIL.Image, "LINEAR") or not used:
        return False
    PIL.Image.LINEAR = PIL.Image.BILINEAR
    return True


def install() -> None:
    """Phase 1. Does nothing when detectron2 is absent (`d2ext.ops` works without it)."""
    if _detectron2_folder() is None:
        return
    _stub_extension()
    _pillow_linear()


# -------------------------------------------------------------------------------------------------
# Phase 2: on demand


class _NumpyWithOldAliases(types.ModuleType):
    """numpy plus the scalar aliases it dropped in 1.24, for single detectron2 modules.

    Assigning `numpy.int = int` globally would mislead other libraries, which probe for the names.
    """

    _ALIASES = {"int": int, "float": float, "str": str, "bool": bool}

    def __init__(self, numpy):
        super().__init__("numpy")
        self._numpy = numpy

    def __getattr__(self, name):
        return self._ALIASES[name] if name in self._ALIASES else getattr(self._numpy, name)


def _restore_numpy_aliases(module_name: str, *aliases: str) -> bool:
    """Give `module_name` its own `np` if its source uses an alias that numpy lacks."""
    import numpy

    module = importlib.import_module(module_name)
    source = Path(module.__file__).read_text(encoding="utf-8")
    lost = [a for a in aliases if a not in vars(numpy) and re.search(rf"\bnp\.{a}\b", source)]
    if not lost:
        return False
    module.np = _NumpyWithOldAliases(numpy)
    return True


class _SortingRandom(random.Random):
    """`random.Random` whose `sample` takes sets again."""

    def sample(self, population, k, **kwargs):
        if isinstance(population, (set, frozenset)):
            population = sorted(population)
        return super().sample(population, k, **kwargs)


def _random_samples_sets() -> bool:
    """Whether `random.sample` accepts a set, as it did before Python 3.11."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(random.Random(0).sample({0}, 1))
        except TypeError:
            return False


@_adaptation
def _map_dataset_sampling() -> bool:
    """`TypeError: Population must be a sequence` when a mapper returns `None`."""
    used = _source_matches("data/common.py", r"\bsample\(self\._fallback_candidates\b")
    if not used or _random_samples_sets():
        return False
    from detectron2.data import common

    original = common.MapDataset.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        rng = _SortingRandom()
        rng.setstate(self._rng.getstate())
        self._rng = rng

    common.MapDataset.__init__ = init
    return True


@_adaptation
def _class_histogram() -> bool:
    """The table of instances per class silently disappears from the log (`np.int`)."""
    return _restore_numpy_aliases("detectron2.data.build", "int")


@_adaptation
def _pascal_voc_ids() -> bool:
    """`AttributeError: module 'numpy' has no attribute 'str'` when Pascal VOC is loaded."""
    return _restore_numpy_aliases("detectron2.data.datasets.pascal_voc", "str")


@_adaptation
def _sem_seg_evaluation() -> bool:
    """`AttributeError: module 'numpy' has no attribute 'int'` in SemSegEvaluator."""
    return _restore_numpy_aliases(
        "detectron2.evaluation.sem_seg_evaluation", "int", "float", "bool"
    )


@_adaptation
def _pascal_voc_evaluation() -> bool:
    """`np.bool` in the Pascal VOC evaluator, with numpy 1.24 to 1.26."""
    return _restore_numpy_aliases("detectron2.evaluation.pascal_voc_evaluation", "bool")


@_adaptation
def _mask_structures() -> bool:
    """`np.bool` in polygon and bit masks, with numpy 1.24 to 1.26."""
    return _restore_numpy_aliases("detectron2.structures.masks", "bool")


@_adaptation
def _visualizer() -> bool:
    """`np.bool` in the visualiser, with numpy 1.24 to 1.26."""
    return _restore_numpy_aliases("detectron2.utils.visualizer", "bool", "int", "float")


@_adaptation
def _video_visualizer() -> bool:
    """`np.bool` in the video visualiser, with numpy 1.24 to 1.26."""
    return _restore_numpy_aliases("detectron2.utils.video_visualizer", "bool")


def patch_data() -> None:
    """For users of `detectron2.data`."""
    require_detectron2()
    _map_dataset_sampling()
    _class_histogram()
    _pascal_voc_ids()
    patch_structures()


def patch_structures() -> None:
    """For users of `detectron2.structures`."""
    require_detectron2()
    _mask_structures()


def patch_evaluation() -> None:
    """For users of `detectron2.evaluation`."""
    require_detectron2()
    _sem_seg_evaluation()
    _pascal_voc_evaluation()


def patch_visualization() -> None:
    """For users of `detectron2.utils.visualizer`."""
    require_detectron2()
    _visualizer()
    _video_visualizer()


def paste_region_masks_with(paste: Callable) -> None:
    """Let detectron2's `ROIMasks.to_bitmasks`, through which all region masks come into images,
    ask a faster function first. Nothing is missing there, so it is no adaptation.

    Args:
        paste: gets the masks (N, M, M), boxes (N, 4), height, width and threshold; returns bool
            bitmaps (N, height, width), or None where detectron2 shall paste.
    """
    require_detectron2()
    from detectron2.structures import BitMasks, ROIMasks

    original = ROIMasks.to_bitmasks
    if getattr(original, "__d2ext__", False):
        return

    @functools.wraps(original)  # with the mark that keeps TorchScript away
    def to_bitmasks(self, boxes, height, width, threshold=0.5):
        corners = getattr(boxes, "tensor", boxes)  # v0.6 takes both
        pasted = paste(self.tensor, corners, height, width, threshold)
        if pasted is None:
            return original(self, boxes, height, width, threshold)
        return BitMasks(pasted)

    to_bitmasks.__d2ext__ = True
    ROIMasks.to_bitmasks = to_bitmasks


# Keys that stand for something which only our training loop and its loader do, and the values that
# ask for none of it.
_OF_OUR_LOOP = {
    "INPUT.COPY_PASTE.PROB": 0,
    "SOLVER.ACCUMULATION_STEPS": 1,
    "SOLVER.EMA_DECAY": 0,
    "SOLVER.FREEZE": [],
    "SOLVER.SKIP_NONFINITE": False,
    "TEST.BEST_METRIC": "",
    "TEST.EARLY_STOPPING": 0,
    "LOG_WRITERS": [],
}


def _value(cfg, key: str, missing):
    """Of a key with dots, or what to take where the config lacks it."""
    for part in key.split("."):
        cfg = cfg.get(part, None) if hasattr(cfg, "get") else None
    return missing if cfg is None else cfg


def announce_optimizer() -> None:
    """Let detectron2's own `build_optimizer`, which its `DefaultTrainer` calls, say that it leaves
    out keys of d2ext. This changes no result, so it is no adaptation."""
    require_detectron2()
    from detectron2.solver import build

    original = build.build_optimizer
    if getattr(original, "__d2ext__", False):
        return

    @functools.wraps(original)
    def announcing(cfg, model):
        solver, logger = cfg.SOLVER, logging.getLogger(__name__)
        plain = {"LR_MULTIPLIERS": [], "LAYER_DECAY": 1.0, "DECAY_MATRICES_ONLY": False}
        ignored = [f"SOLVER.OPTIMIZER={x}" for x in [solver.get("OPTIMIZER", "SGD")] if x != "SGD"]
        ignored += [f"SOLVER.{k}" for k, value in plain.items() if solver.get(k, value) != value]
        if ignored:
            logger.warning(
                "%s has no effect: detectron2's own trainer uses SGD; train with d2ext.engine, or "
                "return d2ext.solver.build_optimizer(cfg, model) in build_optimizer of the trainer",
                " and ".join(ignored),
            )
        loop = [key for key, value in _OF_OUR_LOOP.items() if _value(cfg, key, value) != value]
        if loop:
            logger.warning(
                "%s: what d2ext.engine does, not detectron2's own trainer; train with the former",
                ", ".join(loop),
            )
        return original(cfg, model)

    announcing.__d2ext__ = True
    for name in ("detectron2.solver.build", "detectron2.solver", "detectron2.engine.defaults"):
        module = sys.modules.get(name)
        if getattr(module, "build_optimizer", None) is original:
            module.build_optimizer = announcing


def offer_poolers(constructors: dict[str, Callable]) -> None:
    """Let detectron2's `ROIPooler`, which every head builds by its name, make other poolers.

    detectron2 has no registry of pooler types: `ROIPooler` knows four names and raises for others,
    and each head imports the class. So the class itself asks, before it makes an object of its own,
    whether the name is one of ours. What it knows it makes as before, so this is no adaptation.

    Args:
        constructors: `pooler_type` -> function of `output_size, scales, sampling_ratio` and, if
            given, `canonical_box_size, canonical_level`, that makes the pooler.
    """
    require_detectron2()
    from detectron2.modeling.poolers import ROIPooler

    if getattr(ROIPooler.__new__, "__d2ext__", False):
        return
    canonical = ("canonical_box_size", "canonical_level")

    def make(
        cls, output_size=None, scales=None, sampling_ratio=None, pooler_type=None, *more, **options
    ):
        if cls is not ROIPooler or pooler_type not in constructors:
            return object.__new__(cls)
        options.update(zip(canonical, more))
        return constructors[pooler_type](output_size, scales, sampling_ratio, **options)

    make.__d2ext__ = True
    ROIPooler.__new__ = make
