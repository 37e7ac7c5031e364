"""The commands of ./launch.sh, a file each."""
