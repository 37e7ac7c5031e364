"""The exceptions that mean "a person can fix this": the command line prints them and exits 2, without a traceback."""


class UserError(Exception):
    """A mistake in an experiment, a flag, a file or a machine. The text says what is wrong, where, and what to do."""


class CannotWrite(UserError):
    """A disk is full or not writable: it is no use to try another run of a study."""
