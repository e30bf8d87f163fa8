"""The one exception that users see as a single line."""


class RecipeError(Exception):
    """Bad input: the message is one line that names the file or key, the cause and the remedy.

    Entry scripts print it on stderr without a traceback (unless ``--debug``) and exit with 1.
    """
