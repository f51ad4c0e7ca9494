"""Known bugs: what they are, where each is tried, and what a failure looks like."""
