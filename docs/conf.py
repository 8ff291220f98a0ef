"""How the site is built: Sphinx, Markdown by MyST, no network."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

# Public names are imported on first use, and autodoc sees only what is there.
for package in map(importlib.import_module, ("pipeline", "strategies")):
    for public in package.__all__:
        getattr(package, public)

project = "prefray"
author = "the prefray authors"
copyright = "the prefray authors"
release = version = installed("prefray")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "config_reference", "mathml"]
exclude_patterns = ["_ext"]
nitpicky = True
# The names of other libraries have no page here, and theirs would need a network.
nitpick_ignore_regex = [("py:.*", ".*")]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# What a strategy declares of itself: the page of the strategies says it.
autodoc_default_options = {"exclude-members": "rl, keys, requires_reference, batch_kind, best_metric"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["keys.css"]
html_title = "prefray"
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
