"""The one error a caller can mend: bad input, named."""


class InputError(ValueError):
    """What a user passed (file, setting, argument) is wrong; the message names it, what came and what was expected.

    The command line prints it as one line and exits with 2; every other exception is a failure and exits with 1.
    """
