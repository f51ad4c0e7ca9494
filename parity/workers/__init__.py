"""The processes that compute: torch ranks and the JAX process, and what keeps them from outliving a run."""
