"""How long the guard, the scan and the toolchains take, and how much memory."""
