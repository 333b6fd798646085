"""The adapter tensors of PEFT models."""
