"""What is wrong with the clips of a store, by rule, and the statistics of its features."""
