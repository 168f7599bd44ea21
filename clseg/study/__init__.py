"""The machinery: parameters from files, runs and their records, grids, rows and results."""
