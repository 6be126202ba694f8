"""Purification in the lab: what it does to attacked models, and what other methods do."""
