"""What measures training on a GPU: `python -m utils.benchmark` (see __main__), and its parts."""
