"""What can be wrong with a formula or a table, and the warnings that say what was left out."""

from __future__ import annotations


class FormulaError(ValueError):
    """The formula cannot be read, or does not describe a mixed model."""


class DataError(ValueError):
    """The table does not have what the formula needs."""


class DataWarning(UserWarning):
    """Rows or columns were left out; the message counts or names them."""
