"""The model around the weights: its layers, its inputs, its blocks one after the other."""
