"""Policies that ship, each to be merged under a policy file or run with a model of one's own."""
