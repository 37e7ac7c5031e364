"""Tasks: loss, metrics and reports, one file per kind of task. `lab.tasks.base` defines the interface."""
