"""Ways to combine weights into a release, one file each."""
