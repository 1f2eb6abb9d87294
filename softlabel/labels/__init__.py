"""From logits to the columns of a store: combining, encoding, measuring fidelity, calibration."""
