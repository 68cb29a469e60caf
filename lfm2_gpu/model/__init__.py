"""The model graph over ``lfm2_kernels``. Knows kernels, not files."""
