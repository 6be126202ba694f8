"""Small tools that know nothing of quantization."""
