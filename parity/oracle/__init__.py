"""The oracle: what the reference gives in float64, with each tensor's tolerance. Runs in a process of its own."""
