"""PEFT models: their adapters' tensors, and which models are supported."""
