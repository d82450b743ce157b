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

"""A correction of CRIU's images: programs that somebody holds by O_PATH.

CRIU keeps one record for all descriptors and programs of one file on one
mount, that of whichever process it dumps first. systemd (from 256 on) holds
its systemd-executor by a descriptor that was opened with O_PATH; a process
that runs this program, as "(sd-pam)" of each logged-in user does, is then
restored with that record, and the kernel refuses such a descriptor as a
program (EBADF of PR_SET_MM). So these programs get a record of their own.
"""

import os
import pathlib
import types

from oslo_log import log as logging

from nova_pycontainer.runtime.migration import imagefile

LOG = logging.getLogger(__name__)


def mend(directory: pathlib.Path, messages: types.ModuleType) -> int:
    """Give programs whose record is of an O_PATH descriptor another one.

    :param messages: pycriu's module ``images.pb``
    :returns: how many processes run such a program
    """
    files = directory / 'files.img'
    held = {}
    last = 0
    for entry in imagefile.read(files, messages.file_entry):
        last = max(last, entry.id)
        if entry.HasField('reg') and entry.reg.flags & os.O_PATH:
            held[entry.id] = entry
    if not held:
        return 0
    own: dict[int, int] = {}
    added = []
    changed = 0
    for path in directory.glob('mm-*.img'):
        mm = imagefile.read(path, messages.mm_entry)[0]
        entry = held.get(mm.exe_file_id)
        if entry is None:
            continue
        if mm.exe_file_id not in own:
            last += 1
            own[mm.exe_file_id] = last
            LOG.debug('%s is a program, and held by O_PATH: record %d is of '
                      'the one, %d of the other', entry.reg.name, last,
                      mm.exe_file_id)
            entry.id = entry.reg.id = last
            entry.reg.flags = os.O_RDONLY
            added.append(entry)
        mm.exe_file_id = own[mm.exe_file_id]
        imagefile.write(path, [mm])
        changed += 1
    imagefile.append(files, added)
    return changed
