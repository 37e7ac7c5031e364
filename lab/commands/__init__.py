"""The commands of ./launch.sh, one file each."""
