"""Front doors inside other tools. Nothing here is imported before it is used."""
