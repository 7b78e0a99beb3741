"""The loops on Ray: workers, readers, inference over a cluster."""
