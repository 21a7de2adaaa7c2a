"""Rows that values choose (boxes above a score, what a suppression keeps), in tensors of fixed size.

`mode` has the mode and what it remembers, `carrying` the functions that keep rows as they are, `choosing` and `ranking`
those that choose among them. Importing the package fills the table of rules.
"""

from edgeship.program.rows import carrying, choosing, ranking
from edgeship.program.rows.mode import ChosenRows, Rows

__all__ = ["ChosenRows", "Rows", "carrying", "choosing", "ranking"]
