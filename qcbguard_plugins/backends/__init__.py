"""One stock quantizer for each folder: which weights it takes, what it stores, and how its files are read."""
