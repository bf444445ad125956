"""Settings of Sphinx for the site that `make docs` makes of the pages of this repository.

The source folder is the root of the repository, so that a link of a page leads to the same place on
the site, on GitHub and in a checkout.
"""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from d2ext.version import __version__

ROOT = Path(__file__).resolve().parents[1]

project = "d2ext"
author = "The d2ext contributors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "docs/api.rst",
    "projects/*.md",
    "projects/*/README.md",
    "examples/*/README.md",
]
exclude_patterns = [".*", "build", "datasets", "output", "**/.*"]
highlight_language = "text"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# Docstrings have types in annotations, and Google's sections.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "d2ext"
html_extra_path = ["site"]  # the start page, which leads to root_doc
html_copy_source = False
html_math_renderer = "mathml"  # by docutils, so that pages ask for nothing from elsewhere

# Of pages that are what a program has printed.
TITLES = {
    "docs/benchmarks/ops_cpu": "Operators on a CPU with AVX-512",
    "docs/benchmarks/ops_cpu_avx2": "Operators on a CPU with AVX2",
    "docs/benchmarks/ops_cpu_default_allocator": "Operators on a CPU, default allocator",
    "docs/benchmarks/models_cpu": "Networks on a CPU",
}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def adapted(app, name, source):
    """GitHub shows folders; the site has none, and keeps the words of such links."""
    page = Path(app.env.doc2path(name))

    def replaced(match):
        return match[1] if (page.parent / match[2]).is_dir() else match[0]

    source[0] = _LINK.sub(replaced, source[0])
    if name in TITLES:
        source[0] = f"# {TITLES[name]}\n\n{source[0]}"


def with_literals(app, what, name, object, options, lines):
    """Docstrings have plain backticks around code, where reStructuredText has two."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    lines[:] = text.splitlines()


def visit_inline(self, node):
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self, node):
    self.body.append(f"<p>{tex2mathml(node.astext(), as_block=True)}</p>")
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", adapted)
    app.connect("autodoc-process-docstring", with_literals, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
