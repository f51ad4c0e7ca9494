"""What is read and written: base models, adapters in PEFT's layout, checkpoints that reshard."""
