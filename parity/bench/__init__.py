"""`dora-parity bench`: what correctness costs.

Ours and a peer's take turns in one process, on one thread; a row says whether the ratio is within its limit.

measure.py    a row; taking turns; the median of ratios
linear.py     one 4096 x 4096 layer               network.py   training steps of SmolLM2
prepare.py    adding the adapters                 memory.py    the peaks of whole processes
jax_rows.py   the codec in JAX against bitsandbytes
groups.py     a process a group                   command.py   the verb
    picture.py    the rows as bars
"""
