"""Safeguards, one file each."""
