"""What the subcommands do, as plain functions that know nothing of the command line's syntax."""
