"""VGGSounder: the VGGSound test clips with all labels that are true of them, by modality."""
