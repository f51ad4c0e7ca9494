"""The DoRA layer: its frozen base, its one rule, its norm, and the kinds of layer that it stands for."""
