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

"""A correction of CRIU's images: a console that is nobody's terminal.

CRIU restores a pty whose master is held outside of the container only if it
is the controlling terminal of some session ("No task found with sid 0"). A
guest's console is of none until somebody logs in there. So the images say
that it is the init's, and when the guest is restored it is taken away from
that again (see :func:`nova_pycontainer.runtime.keeper_console.disown`).
"""

import os
import pathlib
import types
import typing as ty

from nova_pycontainer.runtime.migration import imagefile

#: TtyType in CRIU's tty.proto
_PTY = 1
#: linux/major.h: UNIX98_PTY_SLAVE_MAJOR and the seven after it
_SLAVES = range(136, 144)
_INIT = 1


def mend(directory: pathlib.Path, messages: types.ModuleType) -> bool:
    """Give ptys that are of no session, and have no master, to the init.

    :param messages: pycriu's module ``images.pb``
    :returns: whether there was one, so that it has to be taken away again
    """
    path = directory / 'tty-info.img'
    if not path.exists() or not _leads_a_session(directory, messages):
        return False
    data = path.read_bytes()
    entries = []
    for message in imagefile.messages(data):
        entry = messages.tty_info_entry()
        entry.ParseFromString(message)
        entries.append(entry)
    masters = {entry.pty.index for entry in entries
               if entry.type == _PTY and not _is_slave(entry)}
    found = False
    for entry in entries:
        if (entry.type == _PTY and _is_slave(entry) and not entry.sid and
                entry.pty.index not in masters):
            entry.sid = entry.pgrp = _INIT
            found = True
    if found:
        path.write_bytes(imagefile.head(data) + b''.join(
            imagefile.message(entry.SerializeToString())
            for entry in entries))
    return found


def _is_slave(entry: ty.Any) -> bool:
    return os.major(entry.rdev) in _SLAVES


def _leads_a_session(
    directory: pathlib.Path, messages: types.ModuleType
) -> bool:
    for message in imagefile.messages(
            (directory / 'pstree.img').read_bytes()):
        entry = messages.pstree_entry()
        entry.ParseFromString(message)
        if entry.pid == _INIT:
            return bool(entry.sid == _INIT)
    return False
