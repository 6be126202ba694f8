"""The false-positive and power study of the scanner."""
