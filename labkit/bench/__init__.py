"""The figures labkit promises, each measured against a peer in the same run.

`labkit bench` prints them. A file is a group of figures: its `results()` yields each when it is
measured, and raises NotAvailable where this machine cannot.
"""
