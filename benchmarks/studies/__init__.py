"""One question each, answered on small models; the documentation cites what they print."""
