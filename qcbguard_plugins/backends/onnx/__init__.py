"""ONNX Runtime: reading what its dynamic quantization wrote."""
