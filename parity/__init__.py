"""The suite: case -> inputs -> oracle -> ranks -> shards -> checks -> report."""
