"""`python -m torch_impl train`: options, data, steps, phases, and what becomes of a run that is asked to stop."""
