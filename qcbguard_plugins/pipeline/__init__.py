"""Plan, guard, verify, publish: the one way that every front door takes."""
