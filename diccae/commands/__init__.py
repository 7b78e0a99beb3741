"""One file per subcommand: its options, and the call into the package that does the work.

Each has `OPTIONS`, what it can be told, and `main`, which does it.
"""
