"""The pretrained checkpoint: found, read and checked without a framework."""
