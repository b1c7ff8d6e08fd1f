"""One module per evaluation task, each exporting TASK; the module's name is the task's name."""
