"""What a person types before a run, around it and after it: a package a verb."""
