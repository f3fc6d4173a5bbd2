"""Checkpoints in, ONNX graphs with taps out."""
