"""Measurements: each script states its workload, prints what it finds and appends rows to a CSV."""
