"""`dora-parity bench`: what correctness costs.

Ours and a peer's take turns in one process; a row says whether the ratio is within its limit.

    measure.py    a row; taking turns; the median of ratios
    linear.py     one 4096 x 4096 layer               network.py   training steps of SmolLM2
    prepare.py    adding the adapters                 memory.py    the peaks of whole processes
    codec.py      NF4 in JAX and in bitsandbytes      jax_step.py  README's fine-tune in JAX and in PyTorch
    groups.py     a process a group                   command.py   the verb
    picture.py    the rows as bars
"""
