"""What saving and restoring costs, measured beside the alternatives; `make bench` runs it all.

`cases` measures, one case a process; `peers` are the alternatives; `report` judges and shows; `__main__` runs them.
"""
