"""bitsandbytes, and guarded loading of it through transformers."""
