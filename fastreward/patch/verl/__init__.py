"""The drop-in for verl 0.9: what its trainers compute between rollouts and optimizer comes from fastreward.

`fastreward.patch.verl()` applies it in this process. Installing fastreward is enough for it to be applied in every
process that imports verl, the driver and each Ray worker: `plugin.py` is an entry point of verl's group `verl.plugins`.

Each file of this folder has the replacements of one kind and a table of them; `tables.py` puts the tables together and
`apply.py` binds what they list, wherever verl has bound it: in every module that imported the name, in verl's
registries, and in modules that are imported later. A function with another signature than the table expects is left
alone, with a line in the report and a warning.
"""

from __future__ import annotations

from fastreward.patch.verl.apply import verl as verl
