"""Runs programs that nobody has read: cut off from the machine where it allows that, and under limits everywhere."""
