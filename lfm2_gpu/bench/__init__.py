"""Measuring: what kernels take from a GPU, how long they run, and how far that is from the roof."""
