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

"""Files for the root of a server that has no config drive.

As with libvirt, a config drive has them in place of the root file system, and
cloud-init writes them from there.
"""

import base64

from nova.virt import configdrive
from nova.virt import netutils

#: What libvirt's driver writes (``nova.virt.disk.api``).
_INTERFACES = '/etc/network/interfaces'


def files(instance, injected_files, network_info):
    """Return the ``files`` of a container's specification.

    :param injected_files: list of (path, content), from the API
    :param network_info: addresses are written where they are neither by DHCP
        nor without ``[DEFAULT]flat_injected``
    """
    if configdrive.required_by(instance):
        return []
    found = list(injected_files or ())
    interfaces = netutils.get_injected_network_template(network_info)
    if interfaces:
        # Before the user's own, which may be of the same name.
        found.insert(0, (_INTERFACES, interfaces))
    return [{'path': path, 'content': encode(content)}
            for path, content in found]


def encode(content):
    """Text or bytes, for the agent."""
    if isinstance(content, str):
        content = content.encode('utf-8')
    return base64.b64encode(content).decode('ascii')
