"""Make a body used to its new tokens: a LoRA adapter and retrained rows; the checkpoint stays what it is."""
