"""What is expected of each shard, and the comparison with it."""
