"""Published attacks, one a file, each named as its paper names it."""
