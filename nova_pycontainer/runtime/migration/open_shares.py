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


"""A correction of CRIU's images: files of lxcfs that a process has open.

Such a file is as large as what the host's own one says at the moment
(``/proc/loadavg`` changes its size from one second to the next), and CRIU
restores no file whose size is another one than that of the dump.
"""

import pathlib
import types

from nova_pycontainer.runtime import lxcfs
from nova_pycontainer.runtime.migration import imagefile

_PATHS = frozenset(f'/{name}' for name in lxcfs.FILES)


def mend(directory: pathlib.Path, messages: types.ModuleType) -> int:
    """Let these files have any size.

    Where the guest has them of the kernel, they have none, and it is nothing
    that says which file they are.

    :param messages: pycriu's module ``images.pb``
    :returns: how many there are
    """
    files = directory / 'files.img'
    entries = imagefile.read(files, messages.file_entry)
    found = [entry.reg for entry in entries
             if entry.HasField('reg') and entry.reg.name in _PATHS]
    for entry in found:
        entry.ClearField('size')
    if found:
        imagefile.write(files, entries)
    return len(found)
