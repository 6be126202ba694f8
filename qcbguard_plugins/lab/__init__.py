"""A laptop-sized laboratory: a corpus, a small model, attacks on it, and the metrics that tell them apart."""
