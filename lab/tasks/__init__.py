"""Tasks: what is learned, said once, one file for each kind. `lab.tasks.base` says what a task is."""
