"""Mutual scoring, and the images that go into it, on CUDA devices."""
