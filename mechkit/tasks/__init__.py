"""Tasks: prompts with known answers, of the same type as a user's own."""

from mechkit.tasks._docstring import docstring as docstring
from mechkit.tasks._greater_than import greater_than as greater_than
from mechkit.tasks._induction import induction as induction
from mechkit.tasks._ioi import ioi as ioi
from mechkit.tasks._repeated import repeated_tokens as repeated_tokens
