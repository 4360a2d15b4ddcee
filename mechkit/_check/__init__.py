"""The check of arguments: `@checked` checks what a public function is given before the function runs.

1. The call must fit the signature: a misspelt, missing or superfluous argument is named, with the nearest that exists.
2. Each argument must be what its annotation says, items included (`_kinds.py`). An `int` is a whole number of any library's, and
   no bool; several of something are a list, and not one of them.
3. An argument of a name that means the same everywhere (`seed`, `path`, …) must be in that name's range, unless a function states
   its own range.

Wrong types are `TypeError`, wrong values `ValueError`; both name the argument, what was expected, what came, and a fix where
there is one (`_sentences.py`). What depends on the model or the prompts (a layer that exists) is checked by the function itself.
"""

from mechkit._check._door import checked as checked
from mechkit._check._door import naming as naming
from mechkit._check._kinds import is_whole as is_whole
from mechkit._check._kinds import is_whole_dtype as is_whole_dtype
from mechkit._check._kinds import plain as plain
from mechkit._check._sentences import ArgumentTypeError as ArgumentTypeError
from mechkit._check._sentences import out_of_range as out_of_range
from mechkit._check._sentences import shown as shown
