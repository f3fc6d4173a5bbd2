"""Mutual scoring on a CPU: native kernels where they were built, else NumPy."""
