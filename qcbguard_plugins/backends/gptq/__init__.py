"""GPTQ through transformers, Optimum and GPTQModel, which took the place of auto-gptq."""
