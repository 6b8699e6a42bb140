"""Small helpers shared by the notebooks: one module per noun, nothing heavy at import."""
