"""The one exception that means "a person can fix this": the command line prints it and exits 2, without a traceback."""


class UserError(Exception):
    """A mistake in an experiment, a flag, a file or a machine. The text says what is wrong, where, and what to do."""
