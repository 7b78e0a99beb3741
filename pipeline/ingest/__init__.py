"""Sources to store: plan, decode, commit, keep in order."""
