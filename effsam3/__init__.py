# SPDX-License-Identifier: Apache-2.0
"""effsam3: distil SAM 3 into small students, one recipe at a time. Importing it costs nothing: no torch here."""

from effsam3.registration import register_students

__version__ = "0.1.0"

register_students()
