"""Which worlds a lattice is certified for: each rank's cotangent carries the world size (S3)."""

from __future__ import annotations

LARGEST_ODD_PART = {"bfloat16": 1, "float16": 1, "float32": 7, "float64": 7}
"""By compute dtype. A power of two only shifts the exponent, so one draw serves every world whose odd part is at most
this one: in float32 1 to 8, 10, 12, 14, 16 and so on, in bfloat16 and float16 powers of two."""


def odd_part(number: int) -> int:
    """What is left when every factor of two is taken out."""
    return number // (number & -number)
