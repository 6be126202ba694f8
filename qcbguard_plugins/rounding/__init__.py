"""Grid times defense: one guarded weight, and the plan of what the stock quantizer stores for it."""
