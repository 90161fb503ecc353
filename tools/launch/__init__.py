"""Where a run happens: in this process, in several, or in a container."""
