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

"""Which attachment of each volume is the source's, in a live migration.

From ``pre_live_migration`` on Nova's database has the destination's. Those of
the source only the process knows that asked for it (``source_bdms`` in
``ComputeManager._do_live_migration``), and the agent's migration outlives it.
"""

from nova import exception
from nova import objects
from oslo_serialization import jsonutils

#: In ``system_metadata``, with the volume's id: the id of its attachment.
_KEY = 'pycontainer_attachment_'


def remember(context, instance):
    """Write down those of a server whose destination has not begun yet."""
    found = {
        _KEY + bdm.volume_id: bdm.attachment_id
        for bdm in _block_devices(context, instance)
        if bdm.is_volume and bdm.attachment_id}
    if forget(instance) or found:
        instance.system_metadata.update(found)
        instance.save()


def forget(instance):
    """Whether there were any; the caller saves the instance."""
    known = [key for key in instance.system_metadata if key.startswith(_KEY)]
    for key in known:
        del instance.system_metadata[key]
    return bool(known)


def of_source(context, volume_api, instance):
    """The block devices as they were before the destination changed them.

    :param volume_api: the compute manager's
    :returns: a BlockDeviceMappingList; nothing of it is to be saved
    """
    found = _block_devices(context, instance)
    for bdm in found:
        known = bdm.is_volume and instance.system_metadata.get(
            _KEY + bdm.volume_id)
        if known and known != bdm.attachment_id:
            bdm.attachment_id = known
            try:
                info = volume_api.attachment_get(
                    context, known)['connection_info']
            except exception.VolumeAttachmentNotFound:
                # The migration was so far already: nothing is connected.
                continue
            bdm.connection_info = jsonutils.dumps(
                {'serial': bdm.volume_id, **info})
    return found


def _block_devices(context, instance):
    return objects.BlockDeviceMappingList.get_by_instance_uuid(
        context, instance.uuid)
