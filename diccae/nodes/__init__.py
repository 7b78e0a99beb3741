"""What is kept of the nodes a run is on: logs of its processes, and what they use."""
