"""What can be put to the proof: each runs inside a rank, or in the JAX process."""
