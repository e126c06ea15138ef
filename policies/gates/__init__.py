"""Release gates, one file each."""
