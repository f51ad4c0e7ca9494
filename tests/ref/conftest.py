"""The reference is tested in float64, with strict promotion of dtypes and ranks."""

import jax

jax.config.update("jax_enable_x64", val=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
