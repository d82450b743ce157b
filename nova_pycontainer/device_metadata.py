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

    They are on no bus that a guest could find them by; it has the addresses
    of its interfaces, and the paths of its volumes.
    """
    vifs = objects.VirtualInterfaceList.get_by_instance_uuid(
        context, instance.uuid)
    bdms = objects.BlockDeviceMappingList.get_by_instance_uuid(
        context, instance.uuid)
    devices = [
        objects.NetworkInterfaceMetadata(mac=vif.address, tags=[vif.tag])
        for vif in vifs if 'tag' in vif and vif.tag]
    devices += [
        # By its serial Nova finds it when the volume is detached.
        objects.DiskMetadata(
            path=bdm.device_name, serial=bdm.volume_id, tags=[bdm.tag])
        for bdm in bdms if bdm.is_volume and bdm.tag]
    return objects.InstanceDeviceMetadata(devices=devices) if devices else None


def renew(context, instance):
    """Have the metadata service tell what the server has now."""
    instance.device_metadata = build(context, instance)
    instance.save()
