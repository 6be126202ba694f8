"""llama.cpp: its files, its quantizer, its converter."""
