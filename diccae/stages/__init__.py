"""The stages a command runs: work on run folders and stores."""
