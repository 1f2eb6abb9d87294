"""How good a model is, measured, and drawn."""
