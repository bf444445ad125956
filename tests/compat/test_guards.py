"""The probes of d2ext.compat: what has no fault stays as it is; a missing detectron2 is named."""

import json
import pkgutil
import textwrap

import pytest

import d2ext

# A detectron2 that has none of v0.6's faults, in as few lines as the patches look at.
HEALTHY = {
    "__init__.py": "__version__ = '0.6'",
    "layers/__init__.py": "",
    "layers/deform_conv.py": """
        try:
            from detectron2 import _C
        except ImportError:
            _C = None
        """,
    "data/__init__.py": "",
    "data/transforms/__init__.py": "",
    "data/transforms/transform.py": "from PIL import Image\nDEFAULT = Image.BILINEAR",
    "data/common.py": "def choose(self): self._rng.sample(list(self._fallback_candidates), k=1)",
    "data/build.py": "import numpy as np\nZERO = np.zeros(2, dtype=int)",
    "data/datasets/__init__.py": "",
    "data/datasets/pascal_voc.py": "import numpy as np",
    "evaluation/__init__.py": "",
    "evaluation/sem_seg_evaluation.py": "import numpy as np\nprinted = np.int64(1)",
    "evaluation/pascal_voc_evaluation.py": "import numpy as np",
    # A name that numpy has is no fault, even where an older numpy lacks it.
    "structures/__init__.py": "",
    "structures/masks.py": "import numpy as np\ndef empty(): return np.zeros(1, dtype=np.bool)",
    "utils/__init__.py": "",
    "utils/visualizer.py": "import numpy as np",
    "utils/video_visualizer.py": "import numpy as np",
}
PATCH_ALL = """
    import json, random, sys
    import numpy, PIL.Image
    numpy.bool = bool  # also where numpy 1.x is installed
    before = set(vars(PIL.Image)) | {"numpy." + name for name in vars(numpy)}
    import d2ext
    from d2ext import compat
    for patch in ("data", "structures", "evaluation", "visualization"):
        getattr(compat, "patch_" + patch)()
    after = set(vars(PIL.Image)) | {"numpy." + name for name in vars(numpy)}
    import detectron2.structures.masks
    print(json.dumps({
        "applied": compat.applied(),
        "new names": sorted(after - before),
        "stub": "detectron2._C" in sys.modules,
        "own numpy": detectron2.structures.masks.np is not numpy,
        "compiled": compat.has_compiled_detectron2(),
    }))
"""


@pytest.fixture
def healthy(tmp_path):
    for name, source in HEALTHY.items():
        path = tmp_path / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    return tmp_path


def report(run_python, code, *flags, **options):
    process = run_python(*flags, "-c", textwrap.dedent(code), **options)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_nothing_is_touched_where_detectron2_has_no_fault(run_python, healthy):
    found = report(run_python, PATCH_ALL, path=[healthy])
    assert found == {
        "applied": [],
        "new names": [],
        "stub": False,
        "own numpy": False,
        "compiled": False,
    }


def test_a_compiled_extension_is_left_alone(run_python, healthy):
    (healthy / "detectron2/layers/deform_conv.py").write_text("from detectron2 import _C")
    (healthy / "detectron2/_C.py").write_text("def has_cuda(): return True")
    code = """
        import json, d2ext, detectron2._C
        found = d2ext.compat.has_compiled_detectron2(), d2ext.compat.applied()
        print(json.dumps([*found, detectron2._C.has_cuda()]))
    """
    assert report(run_python, code, path=[healthy]) == [True, [], True]


def packages_on_detectron2():
    names = [m.name for m in pkgutil.iter_modules(d2ext.__path__) if m.ispkg]
    return [f"d2ext.{name}" for name in names if name not in ("ops", "projects", "utils")]


@pytest.mark.parametrize("installed", ["nothing", "a folder of that name"])
def test_a_missing_detectron2_is_named_in_one_line_with_its_remedy(run_python, tmp_path, installed):
    if installed != "nothing":  # beside a checkout, which Python takes for a namespace package
        (tmp_path / "detectron2").mkdir()
    code = f"""
        import json, d2ext
        compat = d2ext.compat
        found = {{"applied": compat.applied(), "compiled": compat.has_compiled_detectron2()}}
        for name in {packages_on_detectron2()}:
            try:
                __import__(name)
            except ImportError as error:
                found[name] = str(error)
        print(json.dumps(found))
    """
    found = report(run_python, code, "-S", path=[tmp_path])  # -S: no installed packages at all
    assert found.pop("applied") == []
    assert found.pop("compiled") is False
    for name in packages_on_detectron2():
        assert found[name].startswith("d2ext needs detectron2, which is not installed"), name
        assert "make install" in found[name] and "\n" not in found[name]


def test_the_stub_says_what_a_call_needs_and_hides_no_dunder_name():
    stub = d2ext.compat._StubExtension("detectron2._C")
    with pytest.raises(NotImplementedError, match="detectron2._C.nms_rotated needs a compiled"):
        stub.nms_rotated(1, 2)
    with pytest.raises(AttributeError):  # copy, inspect and importlib probe for such names
        getattr(stub, "__wrapped__")  # noqa: B009
