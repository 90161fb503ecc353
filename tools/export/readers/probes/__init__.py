"""What runs in a reader's environment: nothing here imports anything of ours."""
