"""ONNX Runtime, imported in this one place."""

import os

# On Linux and macOS it writes a device id and a queue of events into the user's cache unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["ort"]
