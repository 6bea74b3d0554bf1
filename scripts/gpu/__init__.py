"""The parts of gpu_check.py: what is checked and measured on a GPU, and the processes that do it."""
