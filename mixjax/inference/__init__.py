"""Functions of a Fitted that say how sure one can be, and of what."""
