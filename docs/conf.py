"""Sphinx: the pages are Markdown, the tables of keys and the API come out of the package itself."""

import re
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "capgap"
copyright = "the capgap contributors"
release = metadata.version("capgap")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_the_code"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"capgap {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

# What the docstrings are written like and napoleon does not know: `Returns: ...` on one line, and `a, b: ...`.
_ONE_LINE = re.compile(r"(Attributes|Raises|Returns|Source): (.+)")
_NAMES = re.compile(r"    (\w+(?:, \w+)+): ")
_COLON = "\ue000"  # in the first line of a property napoleon would take what stands before a colon for its type


def _before_napoleon(app, what, name, obj, options, lines):
    out = []
    for line in lines:
        if found := _ONE_LINE.fullmatch(line):
            out += ["", f":{found[1]}: {found[2]}"]
        else:
            out.append(_NAMES.sub(lambda names: names[0].replace(", ", ","), line))
    if what in ("attribute", "property") and out:
        out[0] = out[0].replace(":", _COLON)
    lines[:] = out


def _after_napoleon(app, what, name, obj, options, lines):
    """Bars are absolute values, not substitutions."""
    lines[:] = [line.replace(_COLON, ":").replace("|", "\\|") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
