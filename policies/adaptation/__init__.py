"""Test-time adaptation: one file per method."""
