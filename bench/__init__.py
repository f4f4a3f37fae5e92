"""The benchmark: the relay and other ways to do the same, side by side on the same work. `python -m bench --help`."""
