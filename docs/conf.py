"""Sphinx configuration; a warning fails the build."""

from etude import __version__

project = "etude"
copyright = "the etude authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "pydata_sphinx_theme"
html_title = "etude"
html_show_sourcelink = False
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["myst.header"]
