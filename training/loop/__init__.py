"""The training loops, without Ray: steps, schedule, labels, meters."""
