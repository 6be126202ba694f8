"""Front doors inside other tools: transformers, GPTQModel, llama.cpp's converter, llm-compressor."""
