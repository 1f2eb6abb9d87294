"""Tests of softlabel.report."""
