"""What the weights alone tell: ``qcbguard scan``."""
