"""Small models, real attacks on them, and what defenses make of these; nothing but the command line imports it."""
