"""Small helpers shared by the notebooks, in rooms (README.md has the map). Nothing heavy at import."""
