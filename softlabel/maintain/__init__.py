"""What happens to a store after it was written: repair, audits, further members, and calibration beforehand."""
