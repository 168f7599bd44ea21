"""The site: `make site` turns pages and notebooks, as committed, into HTML that needs no server and no network.

Sphinx with MyST-NB takes executed notebooks with their pictures, keeps relative links between pages and notebooks, and
its search needs no server. Formulas become MathML, which browsers draw themselves: MathJax would be fetched.
"""

import ast
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
CORE = ("pairs", "losses", "regions", "models", "augment", "settings", "cluster", "loop", "train", "metrics", "stats")
CORE += (
    "data/phantom",
    "data/prepare",
    "data/splits",
    "data/store",
    "stages/sampling",
    "stages/contrast",
    "stages/local",
)

project = "clseg"
author = copyright = "the clseg authors"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["*.md", "notebooks/*.ipynb", "docs/*.md"]
html_theme = "furo"
html_title = "clseg"
html_copy_source = False
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "myst.xref_missing", "misc.highlighting_failure", "mystnb.unknown_mime_type"]


def api() -> str:
    """The public functions and classes of the core with their docstrings, as a page."""
    parts = ["# Reference\n\nThe core of the package: what lessons use.\n"]
    for name in (*CORE, "plots", "teach"):
        text = (ROOT / "clseg" / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        parts.append(f"## clseg.{name.replace('/', '.')}\n\n{ast.get_docstring(tree)}\n")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                about = ast.get_docstring(node) or ""
                shown = node.name + (f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else "")
                if any(ast.unparse(one) == "exercise" for one in node.decorator_list):
                    shown = f"{node.name}(answer)"
                if name == "settings" and isinstance(node, ast.ClassDef):  # its keys, and what they mean
                    about, shown = "", ast.get_source_segment(text, node)
                parts.append(f"### {node.name}\n\n```python\n{shown}\n```\n\n{about}\n")
    return "\n".join(parts)


def formula(self, node: nodes.Node, display: str) -> None:
    """Writes a formula as MathML."""
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app) -> None:
    (ROOT / "docs" / "reference.md").write_text(api(), encoding="utf-8")
    inline, block = (lambda self, node, kind=kind: formula(self, node, kind) for kind in ("inline", "block"))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
