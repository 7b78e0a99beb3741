"""One clip to frames and fbank, in a sandbox."""
