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

"""What the metadata service tells a guest of its devices: the tags that the
user has given them.
"""

from nova import objects


def build(context, instance):
    """Return the InstanceDeviceMetadata of a server, or None.

    Its interfaces are on no bus that a guest could find them by; it has their
    addresses.
    """
    found = objects.VirtualInterfaceList.get_by_instance_uuid(
        context, instance.uuid)
    devices = [
        objects.NetworkInterfaceMetadata(mac=vif.address, tags=[vif.tag])
        for vif in found if 'tag' in vif and vif.tag]
    return objects.InstanceDeviceMetadata(devices=devices) if devices else None
