"""Optimum: guarded exports to ONNX and OpenVINO, and readers of what was exported."""
