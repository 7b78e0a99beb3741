"""What is minimised: loss terms, confusion, and the gather they share."""
