"""The network: encoder, its stems and blocks, decoder and class head."""
