"""The commands of `zellige`, one file each; none imports another."""
