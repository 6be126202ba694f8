"""Is this model attacked? What the weights tell, and what the answers tell."""
