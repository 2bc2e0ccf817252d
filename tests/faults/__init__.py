"""What a run survives: kills, full disks, power cuts, damaged files."""
