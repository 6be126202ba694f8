"""What writes pages of the documentation from results."""
