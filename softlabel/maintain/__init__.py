"""Maintenance of stores: repair, audits, adding members; and calibration of teachers."""
