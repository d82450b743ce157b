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

"""Packet sockets whose interface is gone.

A DHCP client that listened on an interface keeps its socket when that is
detached. The kernel lets go of it then (packet(7)), and CRIU fails to bind it
again. It gets one that is bound to no protocol instead, which hears as
little.
"""

import pathlib
import types

from nova_pycontainer.runtime.migration import imagefile


def mend(directory: pathlib.Path, messages: types.ModuleType) -> int:
    """Unbind packet sockets that are bound to no interface of the guest.

    :param messages: pycriu's module ``images.pb``
    :returns: how many there are
    """
    files = directory / 'files.img'
    entries = imagefile.read(files, messages.file_entry)
    sockets = [entry.psk for entry in entries
               if entry.HasField('psk') and entry.psk.ifindex]
    if not sockets:
        return 0
    known = {device.ifindex for path in directory.glob('netdev-*.img')
             for device in imagefile.read(path, messages.net_device_entry)}
    changed = 0
    for item in sockets:
        if item.ifindex not in known:
            item.ifindex = item.protocol = 0
            changed += 1
    if changed:
        imagefile.write(files, entries)
    return changed
