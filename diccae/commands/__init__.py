"""One file per subcommand: its options, and the call into the package that does the work."""
