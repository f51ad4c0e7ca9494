"""The executable specification of DoRA and QDoRA, on JAX arrays: correct first, accessible second, fast last.

Read SPEC.md beside these files, in this order: types, dora, gradients, layers, codebooks, encoders, quant, quant_fast,
layouts, model_layouts, fsdp, tensor_parallel, mesh, training, state, checkpoint, quantised_checkpoint, adapter_files,
llama, finetune, nnx. Every clause of SPEC.md names the function that states it. Functions are pure and follow the dtype
of their inputs (float32 or float64, under strict promotion too).
"""
