"""What only notebooks need: figures, exercises, recorded measurements, and running one headless."""
