"""The one exception for everything a user can fix.

The command line prints its message as one line and exits with code 2; library users catch it as a ``ValueError``.
"""


class UserError(ValueError):
    """Bad input: a record, a recipe, a checkpoint or a tokenizer that does not fit.

    The message is one line that names the file, the line and the field where they are known, what was seen, what was
    expected and how to fix it.
    """
