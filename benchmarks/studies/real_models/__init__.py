"""Real pretrained models: fetched from the Python registry, attacked, and tested. Nothing of them is committed."""
