"""What a run found out: first the model, then the renderings."""
