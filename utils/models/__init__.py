"""A base model in four bits, and LoRA adapters on it: added, saved, loaded."""
