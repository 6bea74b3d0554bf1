"""The experiments behind the tables of the documents; not installed with the package."""
