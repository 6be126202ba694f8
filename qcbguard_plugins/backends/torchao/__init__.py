"""torchao weight-only quantization, and guarded loading of it through transformers."""
