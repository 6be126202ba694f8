"""One shim a toolchain. Nothing here is imported before it is used."""
