"""What a model's layers really read, and what rounding does to it: between ``qcbguard scan`` and ``qcbguard diff``."""
