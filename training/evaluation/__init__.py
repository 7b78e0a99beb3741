"""What an encoder is worth: probes, retrieval, confusions. Pure arrays."""
