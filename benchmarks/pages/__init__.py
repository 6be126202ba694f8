"""What writes pages of the documentation, and what keeps README and pages true: code, tables, pictures."""
