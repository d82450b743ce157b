# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What the kernel tells in /proc.

proc(5) gives names as they are: the name of a program (``comm``), paths,
mount points and cgroups are bytes that a guest chooses, and need be no UTF-8.
Nobody has to mean harm: the kernel cuts ``comm`` after 15 bytes, be it in the
middle of a character. A guest may as well choose what Python takes for the end
of a line or for a space, and the kernel does not: a carriage return, U+2028,
U+00A0.
"""

import os
import re

_ESCAPED = re.compile(r'\\([0-7]{3})')


def text(path: str | os.PathLike[str]) -> str:
    """What a file has, nothing of it changed.

    What is not of the file system's encoding is there as ``os.fsdecode`` has
    it, so that a path is one again. It cannot be encoded: before it is told to
    anybody it goes through :func:`.errors.printable`.

    :raises OSError: as for any file
    """
    with open(path, 'rb') as f:
        return os.fsdecode(f.read())


def lines(path: str | os.PathLike[str]) -> list[str]:
    """The same, by lines.

    :raises OSError: as for any file
    """
    found = text(path).split('\n')
    return found if found[-1] else found[:-1]


def unescape(field: str) -> str:
    """A field of mountinfo, in which the kernel writes a space, for one, as
    ``\\040`` (proc_pid_mountinfo(5)).
    """
    return _ESCAPED.sub(lambda m: chr(int(m[1], 8)), field)
