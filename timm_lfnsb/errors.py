"""What goes wrong in a way that a user can mend."""


class UserError(RuntimeError):
    """An error whose message is one sentence for the user: what is wrong, and what to do.

    The command line prints it and ends with exit code 1.
    """
