"""What a model answers before and after quantization: ``qcbguard diff``."""
