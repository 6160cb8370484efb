"""Single quantities of data, networks and trainings; one file each."""
