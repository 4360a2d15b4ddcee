"""Prompts and pairs of prompts: tokens of any length, pictures, named positions, answers. Plain values; no model is needed.

- `_prompts.py`: prompts, and the one way in which they are run together (`Prompts.batches`).
- `_stacked.py`: the rows of one forward pass.
- `_segments.py`: which positions are text, and which are the patches of a picture.
- `_pairs.py`: clean and corrupted prompts, with answers and named positions.
"""

from mechkit.prompts._pairs import AnyPrompts as AnyPrompts
from mechkit.prompts._pairs import PromptPairs as PromptPairs
from mechkit.prompts._pairs import as_prompts as as_prompts
from mechkit.prompts._pairs import first_differences as first_differences
from mechkit.prompts._prompts import Batch as Batch
from mechkit.prompts._prompts import Prompts as Prompts
from mechkit.prompts._prompts import Tokenizes as Tokenizes
from mechkit.prompts._prompts import chosen_prompts as chosen_prompts
from mechkit.prompts._segments import Box as Box
from mechkit.prompts._segments import Kind as Kind
from mechkit.prompts._segments import Segment as Segment
from mechkit.prompts._stacked import Stacked as Stacked
