"""Front doors of ``from_pretrained``."""
