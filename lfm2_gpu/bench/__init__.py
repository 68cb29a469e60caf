"""Measuring: what kernels take from a GPU, and later how long they run."""
