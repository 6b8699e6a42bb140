"""Measures QLoRA training on a GPU: `python data/measurements/benchmark`; see __main__."""
