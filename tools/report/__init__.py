"""report.html: a run, or all runs of a folder, as one page without a script or anything from outside."""
