"""The figures of the documents: one module per figure, each with a function ``draw``."""
