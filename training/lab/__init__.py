"""The loops in plain processes of one machine, over features decoded once. Without Ray."""
