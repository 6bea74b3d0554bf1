"""The documentation site: hooks of mkdocs, and of the reader of docstrings."""
